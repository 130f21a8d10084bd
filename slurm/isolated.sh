#!/usr/bin/env bash
# Start a Python of ours:  slurm/isolated.sh [--keep="NAME|NAME"] .../bin/python WORD...
# Modules and profiles on clusters set variables for their own Python: PYTHONPATH would put its
# packages before ours, PYTHONHOME its standard library. All starts of the environment's Python go
# through here, or, where nothing is imported from the checkout, have the option -I.
set -euo pipefail

keep=''
if [[ ${1:-} == --keep=* ]]; then
  keep=${1#--keep=}
  shift
fi
for name in "${!PYTHON@}"; do
  case $name in
  # How text is written, where bytecode goes, what is shown of a crash; PYTHON is containers/venv.sh's.
  PYTHON | PYTHONIOENCODING | PYTHONUTF8 | PYTHONUNBUFFERED | PYTHONFAULTHANDLER | PYTHONHASHSEED) ;;
  PYTHONDONTWRITEBYTECODE | PYTHONPYCACHEPREFIX) ;;
  # What site.toml sets for the training processes is meant for them.
  *) if [[ "|$keep|" != *"|$name|"* ]]; then unset "$name"; fi ;;
  esac
done
# Packages in ~/.local, too.
export PYTHONNOUSERSITE=1
exec "$@"
