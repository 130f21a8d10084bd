#!/usr/bin/env bash
# End the private Slurm and leave nothing:  slurm/local/down.sh
#
#   SLUICE_CLUSTER   the cluster's folder (.cluster)
#
# Also what is left of one that crashed, or was not up yet. Jobs in it are killed.
set -euo pipefail

# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/state.sh"

(($# == 0)) || fail "down.sh: '$*' is not understood; it takes no arguments"
outside_only down.sh
state=$(state_folder)
if [[ ! -e $state && ! -L $state ]]; then
  echo "$state: no cluster is up"
  exit
fi
require_ours "$state"
end_cluster "$state"
echo "$state: the cluster has ended; nothing is left of it"
