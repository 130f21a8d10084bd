# shellcheck shell=bash
# Where the private cluster's state is, and which of its processes are alive.  Sourced by the
# scripts beside it; every path and pid is one of the host, outside the cluster.

note() { printf '%s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

state_folder() { # $SLUICE_CLUSTER, or .cluster; a relative path counts from the repository root
  local root
  root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
  case ${SLUICE_CLUSTER:-.cluster} in
  /*) realpath -m -- "$SLUICE_CLUSTER" ;;
  *) realpath -m -- "$root/${SLUICE_CLUSTER:-.cluster}" ;;
  esac
}

# This file marks a folder that up.sh made, so that it may be removed.
marker_of() { printf '%s\n' "$1/made-by-up.sh"; }
is_clusters() { [[ -f $(marker_of "$1") ]]; }

outside_only() { # outside_only SCRIPT: pids differ inside
  if [[ ${SLUICE_CLUSTER_INSIDE:-} == 1 ]]; then
    fail "$1: this is inside the private cluster; leave it (exit) and run this outside"
  fi
}

# ---- processes ------------------------------------------------------------------------------

start_of() { # start_of PID: when it started, in ticks; fails if it is gone
  local stat fields
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  # The name, in parentheses, may contain anything; after it come the state and 18 others.
  read -r -a fields <<<"${stat##*) }"
  [[ ${fields[0]} != [ZX] ]] || return 1
  printf '%s\n' "${fields[19]}"
}

# A pid alone may belong to another process by the time it is read.
record() { # record FILE: note down the shell that calls this, and what it then becomes
  local pid=$BASHPID
  printf '%s %s\n' "$pid" "$(start_of "$pid")" >"$1"
}

recorded() { # recorded FILE: the pid, if that process is alive
  local pid start
  { read -r pid start <"$1"; } 2>/dev/null || return 1
  [[ $(start_of "$pid") == "$start" ]] || return 1
  printf '%s\n' "$pid"
}

children_of() { # children_of PID
  local children
  { mapfile -d ' ' -t children <"/proc/$1/task/$1/children"; } 2>/dev/null || return 1
  ((${#children[@]})) && printf '%s\n' "${children[@]}"
}

wait_until() { # wait_until SECONDS COMMAND...
  local deadline=$((${EPOCHREALTIME/[.,]/} + $1 * 1000000))
  shift
  until "$@"; do
    ((${EPOCHREALTIME/[.,]/} < deadline)) || return 1
    sleep 0.05
  done
}

is_gone() { ! start_of "$1" >/dev/null; }

end_process() { # end_process PID: kill it, unless it ends by itself in the meantime
  kill -KILL "$1" 2>/dev/null || is_gone "$1" || kill -KILL "$1"
}

# ---- the cluster's parts --------------------------------------------------------------------

login_pid() { # login_pid STATE: pid 1 of the login node
  local leader
  leader=$(recorded "$1/login.pid") && children_of "$leader"
}

node_pid() { # node_pid STATE NODE: pid 1 of a node, if it is on
  local login leader words
  login=$(login_pid "$1") || return 1
  for leader in $(children_of "$login"); do
    { mapfile -d '' -t words <"/proc/$leader/cmdline"; } 2>/dev/null || continue
    if ((${#words[@]} > 3)) && [[ ${words[-1]} == "$2" && ${words[-4]} == */node.sh ]]; then
      # The process in between is the one that unshared.
      [[ ${words[0]} == unshare ]] && children_of "$leader" && return
    fi
  done
  return 1
}

require_ours() { # require_ours STATE: it exists and belongs to this user
  [[ -e $1 ]] || fail "$1: no cluster is up; start it with make cluster-up"
  is_clusters "$1" || fail "$1: is not a cluster's folder; set SLUICE_CLUSTER to one that is"
  [[ -O $1 ]] || fail "$1: belongs to $(stat -c %U -- "$1"); run this as that user"
}

require_up() { # require_up STATE
  require_ours "$1"
  login_pid "$1" >/dev/null || fail "$1: its cluster has stopped; remove it with make cluster-down"
  [[ -e $1/ready ]] || fail "$1: its cluster is starting; wait for make cluster-up"
}

require_node() { # require_node STATE NODE
  local known
  if [[ -z $2 || $2 == */* || ! -d $1/scratch/$2 ]]; then
    known=$(cd -- "$1/scratch" && printf '%s, ' *)
    fail "${2:-(no node)}: not a node of this cluster; choose from ${known%, }"
  fi
}

end_cluster() { # end_cluster STATE: end every process of it, then remove its folder
  local leader login door
  # When pid 1 ends, so does everything in its pid namespace; mounts and interfaces go with the last
  # process that sees them.
  if leader=$(recorded "$1/login.pid"); then
    if login=$(children_of "$leader"); then
      end_process "$login"
    else
      end_process "$leader"
    fi
    wait_until 20 is_gone "$leader" ||
      fail "$1: process $leader does not end; see what it waits for, then make cluster-down"
  fi
  if door=$(recorded "$1/door.pid"); then
    # It ends by itself when the login node is gone, after the last connection.
    if ! wait_until 3 is_gone "$door"; then end_process "$door"; fi
  fi
  if ! rm -rf --one-file-system -- "$1" 2>/dev/null; then
    # A job may have left a folder that even its owner cannot write to.
    chmod -R u+rwX -- "$1"
    rm -rf --one-file-system -- "$1"
  fi
}
