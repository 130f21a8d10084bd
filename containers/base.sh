#!/usr/bin/env bash
# Make a Debian root filesystem for `Bootstrap: localimage`:  containers/base.sh OUT
#
#   OUT      the folder to make; it must not exist, or be empty
#   SUITE    the Debian release (bookworm)
#   TMPDIR   where it is built; takes about 0.5 GB (/tmp)
#
# For machines that cannot reach an image registry: the packages come from the mirror that this
# system's apt uses. The tree contains nothing from this machine or its mirror, and the same state
# of a mirror gives the same tree: its digest is the only line on stdout. OUT.log, or $BASE_LOG, is
# the log.
set -euo pipefail

note() { printf '%s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# ---- arguments ------------------------------------------------------------------------------

if (($# != 1)) || [[ $1 == -* || -z $1 ]]; then
  fail "base.sh: unknown arguments '$*'; use containers/base.sh OUT"
fi
out=$(realpath -m -- "$1")
readonly out log=${BASE_LOG:-$out.log}
readonly suite=${SUITE:-bookworm}
[[ $suite =~ ^[a-z][a-z-]*$ ]] || fail "SUITE=$suite: not a release of Debian; set it to one," \
  "such as bookworm"
# Measured for bookworm: 180 MB in the archive, as much again while it is made, and in OUT.
readonly needed_mib=500
# Newer files get this timestamp, bookworm's release, so that two runs agree.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1686355200}
export LC_ALL=C

# ---- requirements ---------------------------------------------------------------------------

if ! type -P mmdebstrap >/dev/null; then
  fail "mmdebstrap: not on PATH; install it (root can: apt-get install mmdebstrap), or use a" \
    "base image from a registry"
fi
if [[ -e $out && ! -d $out ]] || [[ -d $out && -n $(ls -A -- "$out/") ]]; then
  fail "$out: exists and is not an empty folder; choose another, or delete it"
fi

free_ids() { # the next range that no line of the two files has
  cat -- /etc/subuid /etc/subgid 2>/dev/null | awk -F : '
    BEGIN { first = 100000 }
    $2 + $3 > first { first = $2 + $3 }
    END { print first "-" first + 65535 }'
}

mode=unshare
if ((EUID == 0)); then
  # Root in a container may not be allowed to mount, which mode=root needs.
  if unshare --mount true 2>/dev/null; then mode=root; fi
else
  for command in newuidmap newgidmap; do
    type -P "$command" >/dev/null ||
      fail "$command: not on PATH, and only root can do without; root can: apt-get install uidmap"
  done
  user=$(id -un)
  for file in /etc/subuid /etc/subgid; do
    # A line begins with the user's name or number.
    if [[ ! -r $file ]] || ! grep -q -E "^($user|$EUID):" "$file"; then
      fail "$file: no line for $user, who needs a range of ids; root can: usermod" \
        "--add-subuids $(free_ids) --add-subgids $(free_ids) $user"
    fi
  done
  unshare -r true 2>/dev/null ||
    fail "user namespaces: $user may not create them; ask the administrator to allow them (sysctl" \
      "user.max_user_namespaces), or run this as root"
fi

if ! mkdir -p -- "$out" 2>/dev/null || ! : 2>/dev/null >"$log" || [[ ! -w $out ]]; then
  fail "$out: it, or $log, cannot be created or written; choose another folder"
fi
# mmdebstrap's output may contain a mirror's address.
chmod 600 -- "$log"

work=$(mktemp -d -- "${TMPDIR:-/tmp}/base.XXXXXX" 2>/dev/null) ||
  fail "TMPDIR=${TMPDIR:-/tmp}: cannot create a folder there; make room, or set TMPDIR to another"
done_with=false
clean_up() {
  rm -rf -- "$work"
  # Do not leave half a tree that looks like a complete one.
  if ! $done_with; then find "$out/" -mindepth 1 -delete; fi
}
trap clean_up EXIT
trap 'note "$out: interrupted"; exit 130' INT TERM
# Inside, mmdebstrap's root is another user, who must be able to enter, but not to list.
chmod 711 -- "$work"

for folder in "$work" "$out"; do
  free_mib=$(df -Pk -- "$folder/" | awk 'NR == 2 {
    for (i = 2; i <= NF; i++) if ($i ~ /%$/) print int($(i - 1) / 1024)
  }')
  if [[ -n $free_mib ]] && ((free_mib < needed_mib)); then
    fail "$folder: $free_mib MiB are free on its file system, $needed_mib are needed; make room," \
      "or set TMPDIR or OUT to another disk"
  fi
done

# ---- the mirror ------------------------------------------------------------------------------

public_sources() { # public_sources OPTIONS: lines that are valid wherever the tree is used
  printf 'deb %shttp://deb.debian.org/debian %s main\n' "$1" "$suite"
  # Debian's rolling suites have no separate updates.
  case $suite in
  sid | unstable | testing | experimental) return ;;
  esac
  printf 'deb %shttp://deb.debian.org/debian %s-updates main\n' "$1" "$suite"
  printf 'deb %shttp://deb.debian.org/debian-security %s-security main\n' "$1" "$suite"
}

# CDPATH would send a relative cd elsewhere.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
SUITE=$suite containers/mirror.sh "$work"
mirror=() whence="this system's mirror"
for file in "$work/host.list" "$work/host.sources"; do
  if [[ -e $file ]]; then mirror+=("$file"); fi
done
if ((${#mirror[@]} == 0)); then
  whence='http://deb.debian.org, as this system has no mirror for it'
  options=''
  for file in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
    if [[ -r $file ]]; then options="[signed-by=$file] "; fi
  done
  mirror=("$work/public.list")
  public_sources "$options" >"${mirror[0]}"
fi

# Passwords for the mirror, which mmdebstrap's root cannot read here; only during the build.
hooks=()
if [[ -e $work/auth.conf ]]; then
  hooks+=("--setup-hook=upload '$work/auth.conf' /etc/apt/auth.conf")
fi
if [[ ! -e $work/apt.conf ]]; then : >"$work/apt.conf"; fi

# ---- make it --------------------------------------------------------------------------------

# This runs as root inside, before the tree is packed: it removes traces of this machine.
# shellcheck disable=SC2016  # That shell expands it.
readonly forget='set -eu
cd "$1"
rm -rf etc/apt/apt.conf etc/apt/apt.conf.d/99mmdebstrap etc/apt/auth.conf
find etc/apt/auth.conf.d etc/apt/sources.list.d -mindepth 1 -delete
find var/log var/cache/ldconfig -type f -delete
printf "%s\n" "$sources" >etc/apt/sources.list
rm -f etc/hostname etc/resolv.conf etc/machine-id
echo localhost >etc/hostname
: >etc/resolv.conf
: >etc/machine-id
chmod 644 etc/apt/sources.list etc/hostname etc/resolv.conf etc/machine-id'

stop() { # stop WHAT: a step failed
  local reason
  # apt names what it could not fetch, then why.
  reason=$(sed -n -e 's/^[EW]: Failed to fetch \([^ ]*\) *\(.*\)$/\1 could not be fetched (\2)/p' \
    -e 't end' -e d -e ':end' -e q -- "$log")
  if [[ -n $reason ]]; then
    fail "$1: $reason; check the network and apt's sources and proxy, then run this again"
  fi
  sed -e '/^$/d' -e 's/^/  /' -- "$log" | tail -n 8 | cut -c 1-240 >&2
  fail "$1: failed; the reason is above, the full log in $log"
}

note "$out: making Debian $suite from $whence (about half a minute)"
sources=$(public_sources '')
export sources TMPDIR=$work
archive=$work/base.tar
mmdebstrap --mode="$mode" --variant=minbase --include=ca-certificates --format=tar \
  --aptopt="$work/apt.conf" "${hooks[@]}" --customize-hook="$forget" \
  "$suite" "$archive" "${mirror[@]}" >"$log" 2>&1 </dev/null || stop "mmdebstrap"

# An ordinary user cannot create devices; Apptainer binds the host's.
tar -x -f "$archive" -C "$out" --exclude='./dev/*' --no-same-owner --same-permissions \
  >>"$log" 2>&1 || stop "tar"
# Some folders are only accessible to root: here that is the user who runs this.
chmod -R u+rwX -- "$out" || stop "chmod"
digest=$(sha256sum <"$archive")
done_with=true
note "$out: ready after $SECONDS s"
printf 'sha256:%s\n' "${digest%% *}"
