#!/usr/bin/env bash
# Start Sluice's own Python:  slurm/isolated.sh [--keep="NAME|NAME"] .../bin/python WORD...
# Modules and profiles on clusters set variables for their own Python: PYTHONPATH would put its
# packages before ours, PYTHONHOME its standard library. All starts of the environment's Python go
# through here or, if nothing is imported from the checkout, use the option -I.
set -euo pipefail

keep=''
if [[ ${1:-} == --keep=* ]]; then
  keep=${1#--keep=}
  shift
fi
for name in "${!PYTHON@}"; do
  case $name in
  # Encoding of text, bytecode, output of a crash; PYTHON belongs to containers/venv.sh.
  PYTHON | PYTHONIOENCODING | PYTHONUTF8 | PYTHONUNBUFFERED | PYTHONFAULTHANDLER | PYTHONHASHSEED) ;;
  PYTHONDONTWRITEBYTECODE | PYTHONPYCACHEPREFIX) ;;
  # Variables that site.toml sets for the training processes stay.
  *) if [[ "|$keep|" != *"|$name|"* ]]; then unset "$name"; fi ;;
  esac
done
# Ignore packages in ~/.local, too.
export PYTHONNOUSERSITE=1
exec "$@"
