#!/usr/bin/env bash
# Another userland for the private cluster:  rootfs.sh STATE DIR COMMAND...
# Runs COMMAND in DIR's system with the host's users and data folders. Called by up.sh as root, in
# its own mount namespace. DIR itself is not changed: writes go to memory.
set -euo pipefail

readonly state=$1 tree=$2
shift 2
checkout=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
readonly checkout memory=$state/run

mount -n -t tmpfs -o mode=755 rootfs "$memory"
mkdir "$memory"/{upper,work,root}
readonly root=$memory/root
layers=lowerdir=$tree,upperdir=$memory/upper,workdir=$memory/work
mount -n -t overlay -o "$layers" overlay "$root"

# ---- the host's folders, where they are on the host ----
bind() { # bind FOLDER
  mkdir -p -- "$root$1"
  mount -n --rbind -- "$1" "$root$1"
}
for folder in /*; do
  if [[ -L $folder || ! -d $folder ]]; then continue; fi
  case $folder in
  # These belong to the system; /proc is mounted below.
  /bin | /boot | /etc | /lib* | /lost+found | /proc | /run | /sbin | /usr | /var) ;;
  *) bind "$folder" ;;
  esac
done
for folder in "$checkout" "$state"; do
  if [[ ! -e $root$folder/. ]]; then bind "$folder"; fi
done
mount -n -t proc proc "$root/proc"
mkdir -p "$root/run/sshd"

# ---- the host's users, with those of the system in DIR ----
for file in passwd group; do
  awk -F : '!seen[$1]++' "/etc/$file" "$tree/etc/$file" >"$root/etc/$file"
done
touch "$root"/etc/{hosts,nsswitch.conf,shadow}

# ---- go there; processes that join later end up there as well ----
mkdir "$root/.host"
cd -- "$root"
pivot_root . .host
umount -n --lazy /.host
exec "$@"
