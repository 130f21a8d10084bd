#!/usr/bin/env bash
# TensorBoard of a run, on this node, until its standard input ends:  slurm/board.sh ADDRESS
# cluster/commands/board.py starts it: beside the job on its first node, or on the login node.
set -euo pipefail

: "${1:?the address that it listens at}" "${SLUICE_RUN_FOLDER:?}"
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
# Where it runs, as the array `python`, and the run's folder as it is seen there.
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
# Port 0: a free one, which it names.
"${python[@]}" -m tensorboard.main --logdir "$SLUICE_RUN_FOLDER/tensorboard" \
  --host "$address" --port 0 &
board=$!
# Ended by the end of the input: to a signal, srun would have Slurm kill all of this at once. Without
# the output, whose end would otherwise not be seen when TensorBoard ends by itself.
{ cat && kill "$board"; } <&0 >/dev/null 2>&1 &
wait "$board"
