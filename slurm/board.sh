#!/usr/bin/env bash
# TensorBoard of a run, on this node, until its standard input ends:  slurm/board.sh ADDRESS
# cluster/commands/board.py starts it: beside the job on its first node, or on the login node.
set -euo pipefail

: "${1:?the address to listen on}" "${SLUICE_RUN_FOLDER:?}"
readonly address=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SLUICE_SCRATCH=$(mktemp -d -t sluice-board.XXXXXX)
board=''
# shellcheck disable=SC2317  # the trap calls it
end() {
  if [[ -n $board ]] && kill -0 "$board" 2>/dev/null; then kill "$board"; fi
  rm -rf -- "$SLUICE_SCRATCH"
}
trap end EXIT
trap 'exit 143' TERM INT HUP
export SLUICE_SCRATCH SLUICE_DEVICE=cpu
set --
# Sets the array `python`, and the run folder's path for it.
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
# Port 0: a free one, which TensorBoard prints.
"${python[@]}" -m tensorboard.main --logdir "$SLUICE_RUN_FOLDER/tensorboard" \
  --host "$address" --port 0 &
board=$!
# The end of the input ends it: on a signal, srun would have Slurm kill everything at once. Output
# is closed here, or its end would not be seen when TensorBoard ends by itself.
{ cat && kill "$board"; } <&0 >/dev/null 2>&1 &
wait "$board"
