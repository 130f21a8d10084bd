#!/usr/bin/env bash
# Run a command in the private cluster:  slurm/local/exec.sh [OPTION...] COMMAND...
#
#   --node NAME      on that node (login)
#   --user NAME      as that user (only root's cluster has others)
#   SLUICE_CLUSTER   the cluster's folder (.cluster)
#
# In the current folder and environment, with Slurm's commands and settings added. Inside the
# cluster the command just runs.
set -euo pipefail

# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/state.sh"

# ---- arguments ------------------------------------------------------------------------------

node='' user=''
while (($#)) && [[ $1 == -* ]]; do
  case $1 in
  --*=*)
    set -- "${1%%=*}" "${1#*=}" "${@:2}"
    continue
    ;;
  --node | --user)
    if (($# == 1)) || [[ -z $2 ]]; then fail "exec.sh: $1 needs a name; see slurm/local/exec.sh"; fi
    case $1 in
    --node) node=$2 ;;
    --user) user=$2 ;;
    esac
    shift 2
    ;;
  --)
    shift
    break
    ;;
  *) fail "exec.sh: unknown option '$1'; choose from --node NAME, --user NAME" ;;
  esac
done
(($#)) || fail "exec.sh: no command; use slurm/local/exec.sh [--node NAME] [--user NAME] COMMAND..."

# ---- who and where --------------------------------------------------------------------------

me=$(id -un)
as=()
if [[ -n $user && $user != "$me" ]]; then
  ((EUID == 0)) || fail "--user $user: only root's cluster has other users; leave it out"
  IFS=: read -r _ _ _ group _ home _ < <(getent passwd -- "$user") ||
    fail "--user $user: no such user; root can: useradd $user"
  as=(
    setpriv --reuid "$user" --regid "$group" --init-groups
    env HOME="$home" USER="$user" LOGNAME="$user"
  )
fi
if [[ ${SLUICE_CLUSTER_INSIDE:-} == 1 ]]; then
  [[ -z $node ]] || fail "--node $node: this is inside the private cluster; use srun --nodelist" \
    "$node, or leave it (exit) first"
  exec "${as[@]}" "$@"
fi

state=$(state_folder)
require_up "$state"
if [[ -z $node || $node == login ]]; then
  pid=$(login_pid "$state")
else
  require_node "$state" "$node"
  pid=$(node_pid "$state" "$node") ||
    fail "$node: is off; switch it on with slurm/local/drill.sh power-on $node"
fi

# ---- go -------------------------------------------------------------------------------------

enter=(nsenter --target "$pid" --mount --net --uts --ipc --pid)
if ((EUID != 0)); then enter+=(--user --preserve-credentials); fi
# The folder is entered inside, where it may differ from the one outside, and before the user
# changes, as su does.
exec env PATH="$PATH:/usr/sbin:/sbin" SLURM_CONF="$state/etc/slurm.conf" SLUICE_CLUSTER="$state" \
  SLUICE_CLUSTER_INSIDE=1 "${enter[@]}" env --chdir="$PWD" "${as[@]}" "$@"
