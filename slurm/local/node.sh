#!/usr/bin/env bash
# Pid 1 of a compute node's namespaces:  node.sh ADDRESS STATE NODE
# Started by login.sh. Killing it with -9 simulates a power loss.
set -euo pipefail

readonly address=$1 state=$2 node=$3
# shellcheck source=/dev/null
. "$(dirname -- "${BASH_SOURCE[0]}")/state.sh"

# ---- the network ----
has_link() { ip link show eth0 >/dev/null 2>&1; }
hostname "$node"
ip link set lo up
# login.sh plugs in this end of the cable.
wait_until 60 has_link
ip address add "$address/24" dev eth0
ip link set eth0 up

# ---- a node's own file systems ----
# A /sys with this network's interfaces, not the host's; slurmd looks for the cgroups below it.
mount -n --rbind /sys/fs/cgroup "$state/run"
mount -n -t sysfs sysfs /sys
mount -n --rbind "$state/run" /sys/fs/cgroup
umount -n --lazy "$state/run"
mount -n -t tmpfs -o mode=1777 shm /dev/shm
mount -n --bind "$state/scratch/$node" /var/tmp
mount -n --bind "$state/etc/hosts.node" /etc/hosts

# ---- Slurm ----
drop=()
# The capabilities for the mounts above are not for jobs.
if ((EUID != 0)); then drop=(setpriv --ambient-caps=-all --inh-caps=-all); fi
"${drop[@]}" slurmd -N "$node"

# Pid 1 stays, and reaps orphaned processes.
while :; do
  sleep 3600 &
  wait "$!"
done
