#!/usr/bin/env bash
# Cause what goes wrong on a cluster, on purpose:  slurm/local/drill.sh DRILL NODE
#
#   power-off NODE       the node loses its power: everything on it is gone at once
#   power-on NODE        it boots again
#   cut NODE             its network cable is pulled; processes on it keep running
#   join NODE            the cable is put back
#   restart controller   Slurm's controller is stopped and started
#
# Each returns when it is done. Slurm takes another 10 s to 30 s to notice a lost node.
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly here
# shellcheck source=/dev/null
. "$here/state.sh"

case "$#:${1-}:${2-}" in
2:power-off:* | 2:power-on:* | 2:cut:* | 2:join:* | 2:restart:controller) ;;
*) fail "drill.sh: unknown drill '$*'; choose from power-off NODE, power-on NODE, cut NODE," \
  "join NODE, restart controller" ;;
esac
readonly drill=$1 node=$2
outside_only drill.sh
state=$(state_folder)
readonly state
require_up "$state"

inside() { "$here/exec.sh" "$@" 2>/dev/null; }
order() { printf '%s\n' "$*" >"$state/drills"; }
never() { fail "$node: $drill did not complete within a minute; see $state/log"; }

# ---- the controller -------------------------------------------------------------------------

if [[ $drill == restart ]]; then
  before=$(<"$state/slurmctld.pid")
  # shellcheck disable=SC2329  # wait_until calls it.
  restarted() {
    local now
    # For a moment there is no such file.
    now=$(cat -- "$state/slurmctld.pid" 2>/dev/null) || return
    [[ -n $now && $now != "$before" ]] && inside scontrol ping >/dev/null
  }
  order restart controller
  wait_until 60 restarted || never
  echo 'controller: restarted'
  exit
fi

# ---- a node ---------------------------------------------------------------------------------

require_node "$state" "$node"
pid=$(node_pid "$state" "$node") || pid=''
case $drill:$pid in
power-on:?*) fail "$node: is already on" ;;
power-on:) ;;
*:) fail "$node: is off; switch it on with slurm/local/drill.sh power-on $node" ;;
esac

field() { # field NAME: of what Slurm says about the node
  inside scontrol show node "$node" | sed -n "s/.*\<$1=\([^ ]*\).*/\1/p"
}
responds() { # A * after the state means that it does not.
  local now
  now=$(field State)
  [[ -n $now && $now != *DOWN* && $now != *NOT_RESPONDING* && $now != *'*'* ]]
}

is_cut() { inside ip -oneline link show "$node" | grep -q 'state DOWN'; }
is_joined() { inside ip -oneline link show "$node" | grep -q 'state UP'; }

case $drill in
power-off)
  end_process "$pid"
  wait_until 60 is_gone "$pid" || never
  said='is off'
  ;;
power-on)
  before=$(field SlurmdStartTime)
  booted() { [[ $(field SlurmdStartTime) != "$before" ]] && responds; }
  # Slurm has whole seconds: a boot in the same second as the last one would not be seen. A
  # restarted controller says None until the node reports to it.
  is_later() { [[ $before == None || $(printf '%(%FT%T)T') > $before ]]; }
  wait_until 60 is_later || never
  order power-on "$node"
  wait_until 60 booted || never
  said='is on'
  ;;
cut)
  order cut "$node"
  wait_until 60 is_cut || never
  said='is cut off'
  ;;
join)
  order join "$node"
  wait_until 60 is_joined || never
  # By default, Slurm takes up to a minute to ask again; when told to reconfigure, slurmd reports at
  # once.
  inside --node "$node" kill -HUP "$(<"$state/slurmd-$node.pid")"
  wait_until 60 responds || never
  said='is back on the network'
  ;;
esac
echo "$node: $said"
