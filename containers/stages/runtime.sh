#!/usr/bin/env bash
# The runtime stage of apptainer.def, inside it:  runtime.sh VARIANT LABELS_FILE
set -euo pipefail

readonly variant=$1 labels=$2
readonly here=/opt/containers share=/opt/sluice/share work=/opt/tmp

# A build must use neither the caller's home, which Apptainer mounts at /root, nor its /tmp.
mkdir -p "$work"
export HOME=$work TMPDIR=$work

# ---- settings of the build machine ----------------------------------------------------------

if [[ -f /mnt/environment.sh ]]; then
  # shellcheck disable=SC1091
  . /mnt/environment.sh
fi

# ---- system packages of the environment -----------------------------------------------------

packages=(python3 ca-certificates)
if [[ $variant == cuda ]]; then
  # InfiniBand and RoCE: NCCL loads the verbs, and they load the provider of the card.
  packages+=(libibverbs1 ibverbs-providers librdmacm1 libnuma1)
  # Triton compiles a launcher for each kernel, at run time.
  packages+=(gcc libc6-dev python3-dev)
fi
bash "$here/stages/packages.sh" "${packages[@]}"

# ---- what is in it --------------------------------------------------------------------------

# One line per package: kind, name, version.
dpkg-query --show --showformat 'deb ${binary:Package} ${Version}\n' | LC_ALL=C sort >"$share/packages.txt"
/opt/sluice/bin/python -I -m pip list --format freeze |
  sed -n 's/^\([^=]*\)==\(.*\)$/pypi \1 \2/p' | LC_ALL=C sort >>"$share/packages.txt"

# The same for machines: Debian's and Python's packages, with licences and sources, in CycloneDX.
# Number and date are derived from the content and the commit, so that two builds agree.
digest=$(sha256sum "$share/packages.txt")
number=${digest:0:8}-${digest:8:4}-${digest:12:4}-${digest:16:4}-${digest:20:12}
date=$(date --utc --date "@${SOURCE_DATE_EPOCH:-$(date +%s)}" +%Y-%m-%dT%H:%M:%S+00:00)
document=(--sbom-type cdx --cdx-serialnumber "$number" --timestamp "$date")
PATH=/opt/sbom/bin:$PATH
debsbom generate "${document[@]}" --root / --out "$work/debian"
cyclonedx-py environment --pyproject /opt/sbom/pyproject.toml --output-reproducible \
  --output-format JSON --output-file "$work/python.json" /opt/sluice/bin/python
debsbom merge "${document[@]}" --distro-name "sluice-$variant" --out - \
  "$work/debian.cdx.json" "$work/python.json" >"$share/sbom.cdx.json"

version() { sed -n "s/^pypi $1 //p" "$share/packages.txt"; }
{
  echo "sluice.lock.sha256 $(sha256sum "$share/lock.txt" | cut -d ' ' -f 1)"
  for package in torch transformers accelerate deepspeed; do
    echo "sluice.version.$package $(version "$package")"
  done
  # The packages of EXTRA=, as containers/venv.sh recorded them.
  if [[ -f $share/extra.txt ]]; then sed 's/^\(.*\)==/sluice.extra.\1 /' "$share/extra.txt"; fi
} >>"$labels"

# ---- mount points ---------------------------------------------------------------------------

mkdir -p /workspace /datasets /run-folder /cache

# ---- clean-up -------------------------------------------------------------------------------

rm -rf /opt/sbom /opt/containers "$work"
