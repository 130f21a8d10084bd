#!/usr/bin/env bash
# Stop the private Slurm and remove everything:  slurm/local/down.sh
#
#   SLUICE_CLUSTER   the cluster's folder (.cluster)
#
# Also removes what is left of a cluster that crashed or was not up yet. Jobs in it are killed.
set -euo pipefail

# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/state.sh"

(($# == 0)) || fail "down.sh: unknown argument '$*'; it takes none"
outside_only down.sh
state=$(state_folder)
if [[ ! -e $state && ! -L $state ]]; then
  echo "$state: no cluster is up"
  exit
fi
require_ours "$state"
end_cluster "$state"
echo "$state: the cluster has stopped; everything is removed"
