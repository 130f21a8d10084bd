#!/usr/bin/env bash
# TensorBoard of a run, on this node, until its standard input ends:  slurm/board.sh ADDRESS
# cluster/board.py starts it: beside the job on its first node, or on the login node.
set -euo pipefail

: "${1:?the address that it listens at}" "${SLUICE_RUN_FOLDER:?}"
readonly address=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SLUICE_SCRATCH=$(mktemp -d -t sluice-board.XXXXXX)
export SLUICE_SCRATCH SLUICE_DEVICE=cpu SLUICE_THREADS=1
set --
# Where it runs, as the array `python`, and the run's folder as it is seen there.
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
trap 'rm -rf -- "$SLUICE_SCRATCH"' EXIT
# Port 0: a free one, which it names.
"${python[@]}" -m tensorboard.main --logdir "$SLUICE_RUN_FOLDER/tensorboard" \
  --host "$address" --port 0 &
board=$!
# Ended by the end of the input: to a signal, srun would have Slurm kill all of this at once.
{ cat >/dev/null && kill "$board"; } <&0 &
wait "$board"
