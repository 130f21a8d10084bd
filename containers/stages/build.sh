#!/usr/bin/env bash
# The build stage of apptainer.def, inside it:  build.sh VARIANT CUDA_ARCHITECTURES
# Makes /opt/sluice, the environment of the jobs, and /opt/sbom, the tools that list what is in it.
set -euo pipefail

readonly variant=$1 architectures=$2
readonly here=/opt/containers settings=/mnt

case $variant in
cpu) locks=(pip torch-cpu cpu) ;;
cuda) locks=(pip cuda) ;;
*)
  echo "error: VARIANT=$variant: unknown variant; choose cpu or cuda" >&2
  exit 2
  ;;
esac

# A build must use neither the caller's home, which Apptainer mounts at /root, nor its /tmp, which
# may be small; pip unpacks gigabytes.
export TMPDIR=/opt/tmp HOME=/opt/tmp
mkdir -p "$TMPDIR"

# ---- settings of the build machine ----------------------------------------------------------

if [[ -f $settings/pip.conf ]]; then export PIP_CONFIG_FILE=$settings/pip.conf; fi
# Proxies; exported, as pip and the ops' build read them.
if [[ -f $settings/environment.sh ]]; then
  # shellcheck disable=SC1091
  . "$settings/environment.sh"
fi
# Bytecode is compiled at the end.
export PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_COMPILE=1

# ---- the environment ------------------------------------------------------------------------

packages=(python3 python3-venv ca-certificates)
# The ops' compilers: g++ for the host's part; nvcc comes from PyPI.
if [[ $variant == cuda ]]; then packages+=(g++ python3-dev); fi
bash "$here/stages/packages.sh" "${packages[@]}"

export PYTHON=/usr/bin/python3
environment() { # environment FOLDER FLAVOUR [OPTION]
  if VENV=$1 "$here/venv.sh" "--$2" "${@:3}"; then return; fi
  # The file that the error names is lost with this stage.
  if [[ -f $1/setup.log ]]; then cat -- "$1/setup.log"; fi
  exit 2
}
extra=()
if [[ -f $settings/extra.txt ]]; then extra=("--extra=$settings/extra.txt"); fi
if [[ $variant == cuda ]]; then
  # nvcc has its own folder, which is not copied from this stage.
  environment /opt/nvcc nvcc
  export CUDA_HOME
  CUDA_HOME=$(echo /opt/nvcc/lib/python3*/site-packages/nvidia/cu13)
  # The wheels' layout differs slightly from what the builders of extensions expect.
  ln -s lib "$CUDA_HOME/lib64"
  ln -s libcudart.so.13 "$CUDA_HOME/lib/libcudart.so"
  export TORCH_CUDA_ARCH_LIST=$architectures DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1
  # Without a GPU, it would build the ops of its CPU accelerator under these names.
  export DS_ACCELERATOR=cuda
  # The same image runs on every node, whatever CPU this machine has.
  export CXX=$here/stages/portable-c++
  environment /opt/sluice cuda "${extra[@]}"
else
  environment /opt/sluice cpu "${extra[@]}"
fi
environment /opt/sbom sbom
cp /opt/pyproject.toml /opt/sbom/

# ---- bytecode -------------------------------------------------------------------------------

# Bytecode with unchecked hashes, as no file in an image changes. pip's bytecode is validated by a
# time, which differs from build to build, or under SOURCE_DATE_EPOCH by a hash of the source, which
# each import would read and compute again: 5 % of the time that a job's imports take.
/opt/sluice/bin/python -I -c '
import compileall, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
# Some packages contain a file that this Python cannot compile; it stays as it is.
compileall.compile_dir(sys.prefix, quiet=2, force=True, workers=0, invalidation_mode=mode)'

# ---- additional files -----------------------------------------------------------------------

mkdir -p /opt/sluice/share
cp "$here/selftest.py" /opt/sluice/
# So that the self-test compares with what was asked for, not with what was installed.
for name in "${locks[@]}"; do cat "$here/locks/$name.txt"; done >/opt/sluice/share/lock.txt
rm -rf "$TMPDIR"
