#!/usr/bin/env bash
# Start a private Slurm on this machine:  slurm/local/up.sh [OPTION...]
#
#   --nodes N          compute nodes of 4 CPUs, 8 GB and 2 simulated GPUs each (2)
#   --users NAME,NAME  other users of this machine who may submit jobs too (only as root)
#   --no-names         the nodes resolve no names, not even their own
#   --rootfs DIR       use Slurm and all else from the system in DIR (only as root)
#   --ssh-port PORT    the port of this machine that leads to sshd inside (a free one; 0: none)
#   SLUICE_CLUSTER     the cluster's folder (.cluster)
#
# A real Slurm: controller, accounting, munge, sshd, nodes. Each node is a set of namespaces with
# its own network; nothing on this machine changes. Root is not needed. down.sh removes it all.
set -euo pipefail
umask 022

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly here net=10.77.0
# shellcheck source=/dev/null
. "$here/state.sh"

# ---- arguments ------------------------------------------------------------------------------

nodes=2 others=() names=true rootfs='' port=''
while (($#)); do
  case $1 in
  --*=*)
    set -- "${1%%=*}" "${1#*=}" "${@:2}"
    continue
    ;;
  --no-names) names=false ;;
  --nodes | --users | --rootfs | --ssh-port)
    if (($# == 1)) || [[ -z $2 ]]; then fail "up.sh: $1 needs a value; see slurm/local/up.sh"; fi
    case $1 in
    --nodes) nodes=$2 ;;
    --users) IFS=, read -r -a others <<<"$2" ;;
    --rootfs) rootfs=$2 ;;
    --ssh-port) port=$2 ;;
    esac
    shift
    ;;
  *) fail "up.sh: unknown option '$1'; choose from --nodes N, --users NAME,NAME, --no-names," \
    "--rootfs DIR, --ssh-port PORT" ;;
  esac
  shift
done
outside_only up.sh

[[ $nodes =~ ^([1-9]|1[0-6])$ ]] || fail "--nodes $nodes: not a number from 1 to 16; choose one"
if [[ ! ${port:-0} =~ ^(0|[1-9][0-9]{0,4})$ ]] || ((${port:-0} > 65535)); then
  fail "--ssh-port $port: not a port; choose one from 1024 to 65535, or 0 for none"
fi
me=$(id -un)
users=("$me")
if ((${#others[@]})); then
  ((EUID == 0)) || fail "--users: only root's cluster can have other users; leave it out, or run" \
    "this as root"
  for user in "${others[@]}"; do
    id -- "$user" >/dev/null 2>&1 || fail "--users: $user: no such user; root can: useradd $user"
    if [[ " ${users[*]} " != *" $user "* ]]; then users+=("$user"); fi
  done
fi
if [[ -n $rootfs ]]; then
  ((EUID == 0)) || fail "--rootfs: only root can use another system; leave it out, or run this" \
    "as root"
  [[ -d $rootfs ]] || fail "--rootfs $rootfs: no such folder; give one with a Debian system"
  rootfs=$(realpath -- "$rootfs")
fi

state=$(state_folder)
readonly state log=$state/log
# Slurm's configuration files have no quoting.
[[ $state =~ ^/[A-Za-z0-9._/+@~-]+$ && $state$rootfs != *[:,]* ]] ||
  fail "$state: Slurm cannot use this path (spaces, signs); set SLUICE_CLUSTER to a plain one," \
    "such as /tmp/$me-cluster"
# The longest socket path is a job step's; the kernel allows 107 bytes.
longest=$state/spool/node$nodes/node${nodes}_9999999.4294967291
((${#longest} <= 107)) ||
  fail "$state: $((${#longest} - 107)) characters too long for the sockets in it; set" \
    "SLUICE_CLUSTER to a shorter path, such as /tmp/$me-cluster"

# ---- requirements ---------------------------------------------------------------------------

# Each command with its Debian package.
readonly in_system=(
  slurmctld:slurmctld slurmd:slurmd slurmdbd:slurmdbd sinfo:slurm-client munged:munge
  mariadbd:mariadb-server mariadb-install-db:mariadb-server mariadb:mariadb-client
  mariadb-admin:mariadb-client sshd:openssh-server ip:iproute2 setpriv:util-linux
)
readonly on_host=(
  ssh-keygen:openssh-client python3:python3 unshare:util-linux nsenter:util-linux flock:util-linux
)
missing=() packages=()
look_for() { # look_for COMMAND:PACKAGE FOLDERS
  local path
  # If there is none, `type` finds a file that is not executable.
  if ! path=$(PATH=$2 type -P "${1%%:*}") || [[ ! -x $path ]]; then
    missing+=("${1%%:*}")
    if [[ " ${packages[*]-} " != *" ${1#*:} "* ]]; then packages+=("${1#*:}"); fi
  fi
}
folders=$PATH
if [[ -n $rootfs ]]; then folders=$rootfs/usr/sbin:$rootfs/usr/bin; fi
for pair in "${in_system[@]}"; do look_for "$pair" "$folders"; done
for pair in "${on_host[@]}"; do look_for "$pair" "$PATH"; done
if ((${#missing[@]})); then
  list=$(printf '%s, ' "${missing[@]}")
  fail "${list%, }: missing${rootfs:+ (here, or in $rootfs)}; root can: apt-get install" \
    "--no-install-recommends ${packages[*]}"
fi

namespaces=(--mount --net --uts --ipc --pid --fork --kill-child --mount-proc)
if ((EUID != 0)); then
  # A user namespace gives the capabilities for mounts and the network; the user keeps its name in
  # it.
  namespaces=(--user --map-current-user --keep-caps "${namespaces[@]}")
  if ! unshare --user --map-current-user true 2>/dev/null; then
    remedy='ask the administrator to allow them'
    if [[ -e /proc/sys/kernel/apparmor_restrict_unprivileged_userns ]]; then
      remedy='root can: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0'
    elif [[ -e /proc/sys/kernel/unprivileged_userns_clone ]]; then
      remedy='root can: sysctl -w kernel.unprivileged_userns_clone=1'
    elif [[ -e /proc/sys/user/max_user_namespaces ]]; then
      remedy='root can: sysctl -w user.max_user_namespaces=15000'
    fi
    fail "user namespaces: $me may not create them; $remedy, or run this as root"
  fi
fi
reason=$(unshare "${namespaces[@]}" true 2>&1) ||
  fail "namespaces: $me may not create them here (${reason//$'\n'/ }); run this on the machine" \
    "itself, not in a container that forbids them"
for file in /etc/hosts /etc/nsswitch.conf; do
  [[ -e $file ]] || fail "$file: missing, but the nodes mount theirs over it; root can: touch $file"
done

# ---- the folder -----------------------------------------------------------------------------

if [[ -e $state || -L $state ]]; then
  is_clusters "$state" ||
    fail "$state: exists and is not a cluster's folder; set SLUICE_CLUSTER to a new folder"
  require_ours "$state"
  exec 9<"$(marker_of "$state")"
  flock -n 9 || fail "$state: its cluster is starting; wait for that"
  if recorded "$state/login.pid" >/dev/null; then
    fail "$state: a cluster is up in it; use it (make cluster-shell), or end it (make cluster-down)"
  fi
  note "$state: removed a cluster that had stopped"
  end_cluster "$state"
fi
for user in "${users[@]:1}"; do
  setpriv --reuid "$user" --regid "$(id -g -- "$user")" --init-groups test -x "${state%/*}/" ||
    fail "$state: $user has no access; set SLUICE_CLUSTER to a folder that all users can enter," \
      "such as /tmp/cluster"
done
mkdir -- "$state" 2>/dev/null ||
  fail "$state: cannot be created; set SLUICE_CLUSTER to a folder that can"

is_up=false
# shellcheck disable=SC2329  # The trap calls it.
clean_up() {
  trap '' INT TERM HUP
  if ! $is_up; then end_cluster "$state"; fi
}
trap clean_up EXIT
trap 'note "$state: interrupted"; exit 130' INT TERM HUP
exec 9>"$(marker_of "$state")"
echo "slurm/local/up.sh made this folder, and slurm/local/down.sh removes it." >&9
flock -n 9

mkdir "$state"/{db,etc,log,munge,run,save,scratch,spool,ssh}
chmod 700 "$state"/{db,save}
for ((i = 1; i <= nodes; i++)); do
  mkdir "$state/spool/node$i"
  mkdir -m 1777 "$state/scratch/node$i"
done
# Nobody else needs access.
if ((EUID != 0)); then chmod 700 "$state"; fi

# ---- settings -------------------------------------------------------------------------------

render() { # render NAME OUT
  local text
  text=$(<"$here/conf/$1.in")
  text=${text//@STATE@/$state}
  text=${text//@NET@/$net}
  text=${text//@NODES@/$nodes}
  text=${text//@LAST@/$((10 + nodes))}
  text=${text//@USERS@/${users[*]}}
  text=${text//@USER@/$me}
  text=${text//@PORT@/$port}
  printf '%s\n' "$text" >"$2"
}
for name in slurm.conf gres.conf; do render "$name" "$state/etc/$name"; done
# slurmdbd rejects a configuration file that others can read.
(umask 077 && render slurmdbd.conf "$state/etc/slurmdbd.conf")

echo '127.0.0.1 localhost' >"$state/etc/hosts.node"
{
  cat -- "$state/etc/hosts.node"
  echo "$net.10 login"
  for ((i = 1; i <= nodes; i++)); do echo "$net.$((10 + i)) node$i"; done
} >"$state/etc/hosts"
if $names; then cp -- "$state/etc/hosts" "$state/etc/hosts.node"; fi
# Users as on the host; host names only from the file, so that nothing waits for a DNS server.
{
  sed '/^[[:space:]]*hosts:/d' /etc/nsswitch.conf
  echo 'hosts: files'
} >"$state/etc/nsswitch.conf"
if ((EUID == 0)); then
  (umask 077 && awk -F : -v OFS=: '{ $2 = "*"; print }' /etc/shadow >"$state/etc/shadow")
fi
(umask 077 && head -c 128 /dev/urandom >"$state/munge/key" && chmod 400 "$state/munge/key")

# ---- start it -------------------------------------------------------------------------------

# As at boot: nothing from the caller's environment, which may be a job of another Slurm.
readonly clean=(
  env -i PATH="$PATH" HOME="$HOME" USER="$me" LOGNAME="$me" LC_ALL=C.UTF-8
  SLURM_CONF="$state/etc/slurm.conf" SLUICE_CLUSTER="$state" SLUICE_CLUSTER_INSIDE=1
)
launch() { # launch NAME COMMAND...: in the background, with its record in NAME.pid and log/NAME.log
  (
    record "$state/$1.pid"
    exec setsid "${clean[@]}" "${@:2}"
  ) </dev/null >"$log/$1.log" 2>&1 9>&- &
}

userland=()
if [[ -n $rootfs ]]; then userland=("$here/rootfs.sh" "$state" "$rootfs"); fi
launch login unshare "${namespaces[@]}" "${userland[@]}" \
  "$here/login.sh" "$state" "$net" "$nodes" "$(IFS=, && echo "${users[*]}")"
leader=$!

settled() { [[ -e $state/ready || -s $state/failed ]] || is_gone "$leader"; }
wait_until 150 settled || fail "the cluster: not up after 150 s; $(tail -n 1 -- "$log/login.log")"
if [[ -s $state/failed ]]; then
  fail "$(tail -n 1 -- "$state/failed"); everything is removed, try again"
elif [[ ! -e $state/ready ]]; then
  fail "the cluster: stopped while starting: $(tail -n 1 -- "$log/login.log"); try again"
fi

# ---- the port for ssh -----------------------------------------------------------------------

if [[ $port != 0 ]]; then
  for key in host_key client_key; do
    ssh-keygen -q -t ed25519 -N '' -C sluice-cluster -f "$state/ssh/$key"
  done
  cp -- "$state/ssh/client_key.pub" "$state/ssh/authorized_keys"
  render sshd_config "$state/ssh/sshd_config"
  login=$(login_pid "$state")
  inside=(nsenter --target "$login" --mount --net --uts --ipc --pid)
  if ((EUID != 0)); then inside+=(--user --preserve-credentials); fi
  # sshd must be started by its full path; in another system that is Debian's.
  sshd=/usr/sbin/sshd
  if [[ -z $rootfs ]]; then sshd=$(type -P sshd); fi
  launch door python3 -I "$here/door.py" "${port:-0}" "$state/ssh/port" "$login" \
    "${inside[@]}" "$sshd" -i -e -f "$state/ssh/sshd_config"
  door=$!
  opened() { [[ -e $state/ssh/port ]] || is_gone "$door"; }
  wait_until 60 opened
  [[ -e $state/ssh/port ]] ||
    fail "sshd: $(tail -n 1 -- "$log/door.log"); choose another --ssh-port, or leave it out"
  port=$(<"$state/ssh/port")
  render client_config "$state/ssh/client_config"
  echo "[127.0.0.1]:$port $(cut -d ' ' -f 1,2 "$state/ssh/host_key.pub")" >"$state/ssh/known_hosts"
fi

is_up=true
echo "A private Slurm is up after $SECONDS s: login, node1 to node$nodes"
echo "  make cluster-shell     a shell on its login node"
if [[ $port != 0 ]]; then echo "  ssh -F $state/ssh/client_config login"; fi
echo "  make cluster-down      stop it, and remove everything"
