#!/usr/bin/env bash
# Pid 1 of the login node's namespaces:  login.sh STATE NET NODES USER,USER
#
# Started by up.sh, which has written the settings. Brings up the network, munge, the accounting,
# the controller and the nodes, then runs the drills that drill.sh writes to its pipe.
set -euo pipefail

readonly state=$1 net=$2 nodes=$3 users=$4 log=$1/log
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
me=$(id -un)
readonly here me
# shellcheck source=/dev/null
. "$here/state.sh"

say() { printf '%s %s\n' "$EPOCHREALTIME" "$*"; }

# Lines that are not errors, or only say that something failed.
readonly untelling='initialization failed|state file|not recommended|process config|read/parse'
stop() { # stop WHAT LOG: what did not start, and the line of its log that says why
  local line=''
  if [[ -s $2 ]]; then
    line=$(grep -i -E 'fatal|error|cannot|denied' -- "$2" | grep -v -E "$untelling" | tail -n 1) ||
      line=$(tail -n 1 -- "$2")
  fi
  # Without the time in front.
  printf '%s: did not start: %s\n' "$1" "${line#\[*\] }" >"$state/failed"
  exit 1
}

drop=() force=()
if ((EUID != 0)); then
  # The capabilities for mounts and the network are not for daemons and their jobs.
  drop=(setpriv --ambient-caps=-all --inh-caps=-all)
  # Inside a user namespace, / seems to be owned by nobody, which munged rejects.
  force=(--force)
fi

# ---- what this node sees of the system ------------------------------------------------------

# -n, here and elsewhere: otherwise `mount` leaves a folder in the host's /run.
cover() { mount -n --bind "$state/etc/$1" "/etc/$1" || stop "/etc/$1" "$log/login.log"; }
cover hosts
cover nsswitch.conf
if ((EUID == 0)); then
  # sshd rejects users whose password is locked; passwords are of no use in here.
  cover shadow
  if [[ ! -d /run/sshd ]]; then
    # sshd requires this folder. It is created in our own /run, with all else from the host's.
    mount -n --rbind /run "$state/run"
    mount -n -t tmpfs -o mode=755 run /run
    for entry in "$state"/run/*; do
      name=${entry##*/}
      if [[ -L $entry ]]; then
        cp -P -- "$entry" /run
      elif [[ -d $entry ]]; then
        mkdir -p -- "/run/$name"
        mount -n --rbind -- "$entry" "/run/$name"
      else
        : >"/run/$name"
        mount -n --bind -- "$entry" "/run/$name"
      fi
    done
    umount -n --lazy "$state/run"
    mkdir /run/sshd
  fi
fi

# ---- the network, all of it in here ---------------------------------------------------------

hostname login
ip link set lo up
# A card keeps its address over a power loss. A random one would change with each boot, and the
# other nodes would keep sending to the old one for half a minute.
card_of() { printf '02:00:00:00:00:%02x\n' "$1"; } # card_of LAST_PART_OF_ADDRESS
{ ip link add sluice0 address "$(card_of 10)" type bridge && ip link set sluice0 up &&
  ip address add "$net.10/24" dev sluice0 &&
  # sacctmgr and slurmdbd send a message in two parts, and hold the second back (Nagle) until the
  # first is acknowledged; at once instead of after 40 ms, a request takes a tenth of the time.
  ip route replace local "$net.10" dev sluice0 table local src "$net.10" quickack 1; } ||
  stop "the network" "$log/login.log"

is_unplugged() { ! ip link show "$1" >/dev/null 2>&1; }
has_child() { children_of "$1" >/dev/null; }

power_on() { # power_on NODE
  local leader last=$((10 + ${1#node}))
  # The interface of a node that lost its power disappears a moment after the node.
  wait_until 60 is_unplugged "$1"
  unshare --mount --net --uts --ipc --pid --fork --kill-child --mount-proc \
    "$here/node.sh" "$net.$last" "$state" "$1" >>"$log/$1.log" 2>&1 3>&- &
  leader=$!
  wait_until 60 has_child "$leader" || return
  ip link add "$1" type veth peer name eth0 address "$(card_of "$last")" \
    netns "$(children_of "$leader")" &&
    ip link set "$1" master sluice0 up
}

# ---- munge and the accounting ---------------------------------------------------------------

case $(slurmctld -V) in
# These releases reject the setting that newer ones need without cgroups.
*' 2'[012].*) : >"$state/etc/cgroup.conf" ;;
*) echo CgroupPlugin=disabled >"$state/etc/cgroup.conf" ;;
esac

"${drop[@]}" munged "${force[@]}" --socket="$state/munge/socket" --key-file="$state/munge/key" \
  --pid-file="$state/munge/pid" --log-file="$log/munged.log" --seed-file="$state/munge/seed" ||
  stop munged "$log/munged.log"
say 'munge is up'

readonly db=$state/db
# In memory: it is lost with the cluster anyway, and does not wait for a disk.
mount -n -t tmpfs -o mode=700 db "$db"
# When it starts, MariaDB deletes all temporary tables of its folder: in /tmp also another server's.
mkdir -- "$db/tmp"
"${drop[@]}" mariadb-install-db --no-defaults --user="$me" --datadir="$db/data" \
  --tmpdir="$db/tmp" --skip-test-db \
  --auth-root-authentication-method=socket --auth-root-socket-user="$me" \
  >"$log/mariadb-install.log" 2>&1 || stop mariadb-install-db "$log/mariadb-install.log"
# Small, and quick rather than safe: it lives no longer than the cluster.
"${drop[@]}" mariadbd --no-defaults --user="$me" --datadir="$db/data" --socket="$db/socket" \
  --tmpdir="$db/tmp" --pid-file="$db/pid" --skip-networking --innodb-buffer-pool-size=64M \
  --innodb-log-file-size=32M --innodb-lock-wait-timeout=900 \
  --innodb-flush-log-at-trx-commit=2 --log-error="$log/mariadb.log" &
in_db() { "$1" --no-defaults --socket="$db/socket" --user="$me" "${@:2}" >/dev/null 2>&1; }
wait_until 40 in_db mariadb-admin ping || stop mariadbd "$log/mariadb.log"
in_db mariadb -e 'CREATE DATABASE slurm_acct_db' || stop mariadbd "$log/mariadb.log"
say 'the database is up'

MYSQL_UNIX_PORT=$db/socket "${drop[@]}" slurmdbd >>"$log/slurmdbd.log" 2>&1 ||
  stop slurmdbd "$log/slurmdbd.log"
enter() { sacctmgr --immediate "$@" >"$log/sacctmgr.log" 2>&1; }
# It takes a moment until slurmdbd answers.
if ! wait_until 40 enter add cluster sluice; then
  if is_gone "$(<"$state/slurmdbd.pid")"; then stop slurmdbd "$log/slurmdbd.log"; fi
  stop 'the accounting' "$log/sacctmgr.log"
fi
say 'the accounting is up'

{
  enter add account research,closed Description=sluice Organization=sluice &&
    # A preempted job gets this many seconds to save.
    enter modify qos normal set GraceTime=20 &&
    enter add qos short Priority=100 MaxWall=00:10:00 Flags=DenyOnLimit &&
    enter add qos urgent Priority=1000 Preempt=normal PreemptMode=requeue &&
    enter add user "$users" account=research qos=normal,short,urgent defaultqos=normal &&
    # Slurm has already created an account for root.
    if ((EUID == 0)); then enter modify user root set defaultaccount=research; fi
} || stop sacctmgr "$log/sacctmgr.log"

# ---- the controller and the nodes -----------------------------------------------------------

start_controller() { "${drop[@]}" slurmctld >>"$log/slurmctld.log" 2>&1 3>&-; }
start_controller || stop slurmctld "$log/slurmctld.log"
say 'the controller is up'
for ((i = 1; i <= nodes; i++)); do
  power_on "node$i" || stop "node$i" "$log/login.log"
done

all_idle() { # Names are listed once for each partition.
  local idle
  idle=$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | sort -u | wc -l)
  ((idle == nodes))
}
if ! wait_until 40 all_idle; then
  for ((i = 1; i <= nodes; i++)); do
    if [[ ! -s $log/slurmd-node$i.log ]]; then stop "node$i" "$log/node$i.log"; fi
    if grep -q 'initialization failed' "$log/slurmd-node$i.log"; then
      stop "node$i" "$log/slurmd-node$i.log"
    fi
  done
  stop slurmctld "$log/slurmctld.log"
fi
say 'all nodes are idle'

# ---- drills ---------------------------------------------------------------------------------

restart_controller() {
  local pid
  pid=$(<"$state/slurmctld.pid")
  kill "$pid" && wait_until 30 is_gone "$pid" && start_controller
}

mkfifo -m 600 "$state/drills"
exec 3<>"$state/drills"
: >"$state/ready"
# From here on, no failure may end this shell, and with it the cluster; drill.sh checks the result.
set +e
while read -r drill node <&3; do
  say "drill: $drill $node"
  case $drill in
  power-on) power_on "$node" ;;
  cut) ip link set "$node" down ;;
  join) ip link set "$node" up ;;
  restart) restart_controller ;;
  esac
done
