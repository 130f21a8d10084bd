#!/usr/bin/env bash
# Install Apptainer on this machine and print its path:  containers/install-apptainer.sh [--check]
#
#   --check             install nothing: print the path, or an error of one line
#   APPTAINER           use this one and no other
#   APPTAINER_PREFIX    where a private copy is (.apptainer; a relative path starts at the
#                       repository root)
#
# In this order: an installed one; the private copy of an earlier run; the distribution's package,
# if root (or sudo) can install one; a private copy of Debian's package, which needs no root and
# does not change the system. The path is the only line on stdout.
set -euo pipefail

# The first version with --build-arg, which the definitions of the images need.
readonly oldest=1.2
# Measured: 85 MB stay; the rest is for lists and packages during the installation.
readonly needed_mib=300
# The version of a private copy's content and layout; another layout needs another number.
readonly layout=1
readonly project=https://raw.githubusercontent.com/apptainer/apptainer/main

note() { printf '%s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# ---- arguments ------------------------------------------------------------------------------

check_only=false
case "$#:${1-}" in
0:) ;;
1:--check) check_only=true ;;
*) fail "install-apptainer.sh: unknown arguments '$*'; use containers/install-apptainer.sh or" \
  "containers/install-apptainer.sh --check" ;;
esac

# CDPATH would send a relative cd elsewhere.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# Nothing here needs translations, and apt's output is parsed below.
export LC_ALL=C

# The linker's paths are written into the copy, so its own path must be the final one.
prefix=$(realpath -m -- "${APPTAINER_PREFIX:-.apptainer}")
readonly prefix
readonly lock_file=$prefix/.sluice-lock stamp=$prefix/.sluice-stamp
readonly root=$prefix/root tools=$prefix/tools work=$prefix/work private=$prefix/bin/apptainer
machine=$(uname -m)
readonly machine stamp_line="$layout $machine $prefix"

# ---- is it there already? -------------------------------------------------------------------

version_of() { # version_of COMMAND: its version, if it is an Apptainer that runs
  local answer
  answer=$("$1" version 2>/dev/null) || return 1
  [[ $answer =~ ^[0-9]+(\.[0-9]+)+ ]] || return 1
  printf '%s\n' "${BASH_REMATCH[0]}"
}

new_enough() { # new_enough VERSION
  [[ $(printf '%s\n' "$oldest" "$1" | sort -V | head -n 1) == "$oldest" ]]
}

# Report later problems now, while they can still be fixed.
say_what_is_missing() {
  local remedy='let an administrator allow them'
  if [[ ! -r /dev/fuse || ! -w /dev/fuse ]]; then
    note "note: /dev/fuse: missing, or not readable and writable for this user, so images start" \
      "only with --unsquash, which unpacks the whole image each time; root can: chmod 666" \
      "/dev/fuse"
  fi
  if ! unshare -r true 2>/dev/null; then
    if [[ -e /proc/sys/kernel/apparmor_restrict_unprivileged_userns ]]; then
      remedy='root can: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0'
    elif [[ -e /proc/sys/kernel/unprivileged_userns_clone ]]; then
      remedy='root can: sysctl -w kernel.unprivileged_userns_clone=1'
    elif [[ -e /proc/sys/user/max_user_namespaces ]]; then
      remedy='root can: sysctl -w user.max_user_namespaces=15000'
    fi
    note "note: user namespaces: this user may not create them, and without them no image starts" \
      "or builds; $remedy"
  fi
  if ((EUID != 0)) && ! PATH=$PATH:/usr/bin:/bin type -P newuidmap >/dev/null; then
    note "note: newuidmap: not found, so users with a line in /etc/subuid cannot build images," \
      "and others only with fakeroot; root can install uidmap (shadow-utils on Red Hat)"
  fi
}

answer_with() { # answer_with PATH
  say_what_is_missing
  printf '%s\n' "$1"
  exit 0
}

is_ready() { # No lock is taken: an install removes the stamp before it changes anything.
  [[ -f $stamp && $(<"$stamp") == "$stamp_line" ]] && version_of "$private" >/dev/null
}

if [[ -n ${APPTAINER:-} ]]; then
  path=$(type -P -- "$APPTAINER") ||
    fail "APPTAINER=$APPTAINER: no such executable; set it to Apptainer's path, or unset it"
  version=$(version_of "$path") ||
    fail "APPTAINER=$APPTAINER: does not run as Apptainer; set it to Apptainer's path, or unset it"
  new_enough "$version" ||
    fail "APPTAINER=$APPTAINER: this is $version, $oldest or newer is needed; set it to a newer" \
      "one, or unset it"
  answer_with "$(realpath -s -- "$path")"
fi

too_old=''
while IFS= read -r path; do
  if version=$(version_of "$path"); then
    if new_enough "$version"; then answer_with "$(realpath -s -- "$path")"; fi
    note "note: $path: this is $version, $oldest or newer is needed; skipped"
    too_old=" of version $oldest or newer"
  fi
done < <(type -aP apptainer)

if is_ready; then answer_with "$private"; fi
if $check_only; then
  fail "apptainer: none$too_old on PATH, nor in $prefix; run containers/install-apptainer.sh, or" \
    "load it (module load apptainer)"
fi

# ---- apt and root, with their output kept in case something fails ---------------------------

output=$(mktemp -- "${TMPDIR:-/tmp}/install-apptainer.XXXXXX" 2>/dev/null) ||
  fail "TMPDIR=${TMPDIR:-/tmp}: cannot create a file there; make room, or set TMPDIR to another" \
    "folder"
readonly output host_update=$output.update

# It is kept if an error refers to it. The work folder, whose apt settings may contain a password,
# is always removed.
keep_output=false makes_copy=false
# shellcheck disable=SC2329  # The trap calls it.
clean_up() {
  rm -f -- "$host_update"
  if ! $keep_output; then rm -f -- "$output"; fi
  if $makes_copy; then rm -rf -- "$work"; fi
}
trap clean_up EXIT

quietly() { "$@" >"$output" 2>&1 </dev/null; }

stop() { # stop WHAT: a step failed
  local reason records=("$output")
  if [[ -e $host_update ]]; then records+=("$host_update"); fi
  # apt names what it could not fetch, then why.
  reason=$(sed -n -e 's/^[EW]: Failed to fetch \([^ ]*\) *\(.*\)$/\1 could not be fetched (\2)/p' \
    -e 't end' -e d -e ':end' -e q -- "${records[@]}")
  if [[ -n $reason ]]; then
    fail "$1: $reason; check the network and apt's sources and proxy, then run this again"
  fi
  keep_output=true
  sed -e '/^$/d' -e 's/^/  /' -- "$output" | tail -n 8 | cut -c 1-240 >&2
  fail "$1: failed; the reason is above, the full log in $output"
}

# A mirror that does not answer is reported in seconds, not in minutes.
readonly patience=(
  -o Acquire::Retries=0 -o Acquire::http::Timeout=5 -o Acquire::https::Timeout=5
)

as_root=(false)
if ((EUID == 0)); then
  as_root=(env)
elif quietly sudo -n true; then
  as_root=(sudo -n env)
fi
is_root() { [[ ${as_root[0]} != false ]]; }
has() { type -P "$1" >/dev/null; }

# The programs that Apptainer runs, each with its Debian package.
readonly companions=(
  mksquashfs:squashfs-tools squashfuse:squashfuse fuse-overlayfs:fuse-overlayfs
  fakeroot:fakeroot newuidmap:uidmap
)
missing_packages() { # missing_packages COMMAND:PACKAGE...
  local pair
  for pair in "$@"; do
    if ! has "${pair%%:*}"; then printf '%s\n' "${pair#*:}"; fi
  done
}

# For apt, a source that cannot be fetched is a warning, which is harmless if it has none of the
# packages; if a package is missing, it is the reason.
update() { # update COMMAND...: the system's apt-get, or a private one
  quietly "$@" -q update || stop "apt-get update"
  cp -- "$output" "$host_update"
}

apt_install() { # apt_install PACKAGE...
  local apt=("${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -q "${patience[@]}")
  # Another program may hold dpkg's lock for a while, such as the nightly upgrade.
  apt+=(-o DPkg::Lock::Timeout=120 install -y --no-install-recommends)
  if quietly "${apt[@]}" "$@"; then return; fi
  # The lists may be missing, as in a fresh container, or out of date.
  update "${as_root[@]}" apt-get "${patience[@]}"
  quietly "${apt[@]}" "$@" || stop "the packages $*"
}

# ---- the distribution's package -------------------------------------------------------------

candidate() {
  local answer=''
  if has apt-cache; then
    answer=$(apt-cache policy apptainer 2>/dev/null | sed -n 's/^  Candidate: \(.*\)/\1/p')
  elif has dnf; then
    # True for no match too; a failure means that no repository can be asked.
    answer=$(dnf -q repoquery --qf '%{version}\n' apptainer 2>/dev/null | sort -V | tail -n 1) ||
      return 1
  fi
  # An epoch is not part of Apptainer's own version.
  answer=${answer#*:}
  [[ $answer == [0-9]* ]] && printf '%s\n' "$answer"
}

apt_has_lists() { [[ $(apt-cache policy bash 2>/dev/null) == *" Packages"* ]]; }

if is_root; then
  if has apt-cache && ! apt_has_lists; then
    update "${as_root[@]}" apt-get "${patience[@]}"
  fi
  if version=$(candidate) && new_enough "$version"; then
    note "apptainer: installing the system's package, version $version"
    if has apt-get; then
      mapfile -t packages < <(missing_packages "${companions[@]}")
      apt_install apptainer "${packages[@]}"
    else
      quietly "${as_root[@]}" dnf -y -q install apptainer || stop "the package apptainer"
    fi
    if ! path=$(type -P apptainer) || ! version_of "$path" >/dev/null; then
      fail "apptainer: the system's package is installed but does not run; ask the administrator"
    fi
    note "apptainer: ready after $SECONDS s"
    answer_with "$path"
  fi
fi

# ---- a private copy: can it be made here? ---------------------------------------------------

elsewhere="load it (module load apptainer), ask the administrator, or use the installer of the"
elsewhere+=" Apptainer project, which needs no root: $project/tools/install-unprivileged.sh"
case $machine in
x86_64) architecture=amd64 triplet=x86_64-linux-gnu loader=ld-linux-x86-64.so.2 ;;
aarch64) architecture=arm64 triplet=aarch64-linux-gnu loader=ld-linux-aarch64.so.1 ;;
*) architecture='' ;;
esac
for command in apt-get apt-config dpkg-deb flock; do
  if ! has "$command"; then
    fail "apptainer: none$too_old on this machine, nor a package to install, and without $command" \
      "a private copy cannot be installed; $elsewhere"
  fi
done
if [[ -z $architecture ]]; then
  fail "apptainer: none$too_old on this machine, and a private copy is for x86_64 and aarch64," \
    "not $machine; $elsewhere"
fi

# The path is written into settings of the linker, apt, the shell and sed.
if [[ $prefix == *[^A-Za-z0-9/._@%+,=~-]* ]]; then
  fail "APPTAINER_PREFIX=$prefix: the path of a private copy must not contain spaces or special" \
    "characters of shells and linkers; set it to another"
fi
# Only a folder that this script made, or an empty one, may be cleared.
if [[ -d $prefix && ! -e $lock_file && -n $(ls -A -- "$prefix/") ]]; then
  fail "APPTAINER_PREFIX=$prefix: the folder was not made by containers/install-apptainer.sh; set" \
    "it to another path, or delete it"
fi
if ! mkdir -p -- "$prefix" 2>/dev/null || ! : 2>/dev/null >>"$lock_file"; then
  fail "APPTAINER_PREFIX=$prefix: the folder cannot be created or written; set it to another path"
fi
exec 9>>"$lock_file"
if ! flock -n 9; then
  note "$prefix: waiting for another installation into it to finish"
  flock 9 || fail "$lock_file: cannot be locked; set APPTAINER_PREFIX to a path on a local disk"
fi
# Another install may have finished while this one waited.
if is_ready; then answer_with "$private"; fi

free_mib=$(df -Pk -- "$prefix/" | awk 'NR == 2 {
  for (i = 2; i <= NF; i++) if ($i ~ /%$/) print int($(i - 1) / 1024)
}')
if [[ -n $free_mib ]] && ((free_mib < needed_mib)); then
  fail "APPTAINER_PREFIX=$prefix: $free_mib MiB are free on its file system, $needed_mib are" \
    "needed; make room, or set it to a path on another disk"
fi

# ---- a private apt --------------------------------------------------------------------------

# The host's transport settings: proxies, certificates, credentials, limits. Not its hooks, which
# need root, nor which kinds of lists it downloads.
transport() {
  apt-config dump |
    grep -E '^(Acquire::|Dir ""|Dir "/|Dir::Etc "|Dir::Etc::(netrc|trusted)(parts)? )' |
    grep -v -E '^Acquire::(IndexTargets|Languages|Changelogs|Retries|https?::Timeout)'
}

# write_apt NAME STATUS SETTING...: makes $work/NAME.conf, to be named by APT_CONFIG. That file
# is read before the others, so it can say that there are no others.
write_apt() {
  local name=$1 status=$2
  shift 2
  mkdir -p -- "$work/$name/state/lists/partial" "$work/$name/cache/archives/partial"
  {
    transport
    printf '%s;\n' 'Dir::Etc::main "/dev/null"' 'Dir::Etc::parts "/dev/null"' \
      "Dir::State \"$work/$name/state\"" 'Dir::State::lists "lists"' \
      "Dir::State::status \"$status\"" \
      "Dir::Cache \"$work/$name/cache\"" 'Dir::Cache::archives "archives"' \
      'Dir::Cache::pkgcache ""' 'Dir::Cache::srcpkgcache ""' \
      "Dir::Log \"$work/$name\"" \
      'Acquire::Languages "none"' 'Acquire::Retries "0"' \
      'Acquire::http::Timeout "5"' 'Acquire::https::Timeout "5"' \
      "APT::Architecture \"$architecture\"" "APT::Architectures \"$architecture\"" \
      'APT::Sandbox::User "root"' "$@"
  } >"$work/$name.conf"
  # The line about the sandbox: apt's own user cannot enter a folder under a private home.
}

apt_get() { # apt_get NAME ARGUMENT...
  APT_CONFIG=$work/$1.conf quietly apt-get -q "${@:2}"
}

unpack() { # unpack NAME FOLDER PACKAGE...: downloads, with signatures checked, and unpacks
  local name=$1 folder=$2 deb
  shift 2
  mkdir -p -- "$work/$name/debs" "$folder"
  (cd -- "$work/$name/debs" && apt_get "$name" download "$@") || stop "the packages $*"
  for deb in "$work/$name/debs"/*.deb; do
    quietly dpkg-deb -x "$deb" "$folder" || stop "${deb##*/}"
  done
}

# ---- the tools that the host lacks, from its own release -------------------------------------

# An ordinary user's copies are in $tools. newuidmap is not among them: it must belong to root.
unpack_host_packages() { # unpack_host_packages PACKAGE...: and what they need and the host lacks
  local dependencies=()
  write_apt host "$(apt_path Dir::State::status/f)" \
    "Dir::Etc::sourcelist \"$(apt_path Dir::Etc::sourcelist/f)\"" \
    "Dir::Etc::sourceparts \"$(apt_path Dir::Etc::sourceparts/d)\"" \
    "Dir::Etc::preferences \"$(apt_path Dir::Etc::preferences/f)\"" \
    "Dir::Etc::preferencesparts \"$(apt_path Dir::Etc::preferencesparts/d)\""
  update env APT_CONFIG="$work/host.conf" apt-get
  apt_get host -s --no-install-recommends install "$@" || stop "the packages $*"
  mapfile -t dependencies < <(sed -n 's/^Inst \([^ ]*\) .*/\1/p' "$output")
  # The script fakeroot is made to look here for its library, even if the host has one.
  if [[ " $* " == *' fakeroot '* ]]; then dependencies+=(libfakeroot); fi
  mapfile -t dependencies < <(printf '%s\n' "$@" "${dependencies[@]}" | sort -u)
  unpack host "$tools" "${dependencies[@]}"
}

apt_path() { # apt_path ITEM/KIND: a path from apt's configuration
  local line
  line=$(apt-config shell value "$1")
  # It quotes for a shell; one line is one plain path.
  line=${line#value=\'}
  printf '%s\n' "${line%\'}"
}

readonly libraries=$tools/usr/lib/$triplet:$tools/lib/$triplet

patch_tools() {
  local file
  for file in "$tools"/usr/bin/* "$tools"/usr/sbin/* "$tools"/bin/*; do
    # Some of these patterns match nothing, and some files are scripts.
    if [[ -f $file && ! -L $file ]] && "${patchelf[@]}" --print-interpreter "$file" \
      >/dev/null 2>&1 && [[ ${file##*/} != patchelf ]]; then
      quietly "${patchelf[@]}" --force-rpath --set-rpath "$libraries" "$file" || stop "$file"
    fi
  done
  # The package's installation would make a link that selects the variant of `fakeroot`, and the
  # script has hard-coded paths.
  if [[ -e $tools/usr/bin/fakeroot-sysv ]]; then
    sed -e "s#=/usr\$#='$tools/usr'#; s#=/usr/bin\$#='$tools/usr/bin'#" \
      -e "s#^PATHS=/usr/lib/$triplet/#PATHS='$tools'/usr/lib/$triplet/#" \
      "$tools/usr/bin/fakeroot-sysv" >"$tools/usr/bin/fakeroot"
    chmod 755 "$tools/usr/bin/fakeroot"
    ln -s faked-sysv "$tools/usr/bin/faked"
  fi
}

# ---- Apptainer itself -----------------------------------------------------------------------

# The mirror from which this system gets Debian packages, if it does.
find_mirror() { # sets mirror
  local codename=''
  # Downloaded lists say where they are from.
  # shellcheck disable=SC2016  # These are names of apt's.
  quietly apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(SITE)' 'Created-By: Packages' ||
    stop "apt's sources"
  mirror=$(sed -n -e 's/^Debian|Debian|//p' -e 't end' -e d -e ':end' -e q -- "$output")
  if [[ -z $mirror ]] && grep -q '^ID=debian$' /etc/os-release; then
    # Without lists: the source with the section `main` of this very release.
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    quietly apt-get --print-uris update || stop "apt's sources"
    mirror=$(sed -n -e "s#^'\([^']*\)/dists/${codename:-sid}/main/binary-.*#\1#p" \
      -e 't end' -e d -e ':end' -e q -- "$output")
  fi
  # Systems other than Debian have none.
  : "${mirror:=http://deb.debian.org/debian}"
}

find_keyring() { # sets keyring
  local file
  for file in "$@"; do
    if [[ -r $file ]]; then
      keyring=$file
      return
    fi
  done
  return 1
}

make_copy() {
  local mirror keyring binary starter packages=() wanted=("${companions[@]}" patchelf:patchelf)
  find_mirror
  note "$prefix: making a private copy of Debian's apptainer from $mirror (once; about 10 s)"
  mkdir -p -- "$work"
  # The transport settings may contain the password of a proxy.
  chmod 700 -- "$work"

  mapfile -t packages < <(missing_packages "${wanted[@]}" | sort -u)
  # Debian's keys are there on Debian; elsewhere the system's own archive has them, signed.
  local keyrings=(/usr/share/keyrings/debian-archive-keyring.{gpg,pgp})
  find_keyring "${keyrings[@]}" || packages+=(debian-archive-keyring)
  patchelf=(patchelf)
  if is_root; then
    if ((${#packages[@]} > 0)); then
      note "  the system's packages ${packages[*]}"
      apt_install "${packages[@]}"
    fi
  else
    mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sed -e '/^$/d' -e '/^uidmap$/d')
    if ((${#packages[@]} > 0)); then
      note "  ${packages[*]}, which this system lacks, beside Apptainer"
      unpack_host_packages "${packages[@]}"
      if ! has patchelf; then
        patchelf=(env "LD_LIBRARY_PATH=$libraries" "$tools/usr/bin/patchelf")
      fi
      patch_tools
    fi
  fi
  find_keyring "${keyrings[@]}" "${keyrings[@]/#/$tools}" ||
    fail "debian-archive-keyring: no keys to check Debian's signatures with; install that package"

  printf 'deb [signed-by=%s arch=%s] %s sid main\n' "$keyring" "$architecture" "$mirror" \
    >"$work/sid.list"
  : >"$work/status"
  # By default, a list that cannot be fetched is only a warning for apt. The system's preferences
  # are about its own packages; on some systems they reject sid.
  write_apt sid "$work/status" "Dir::Etc::sourcelist \"$work/sid.list\"" \
    'Dir::Etc::sourceparts "/dev/null"' 'Dir::Etc::preferences "/dev/null"' \
    'Dir::Etc::preferencesparts "/dev/null"' 'APT::Update::Error-Mode "any"'
  rm -f -- "$host_update"
  apt_get sid update || stop "Debian's packages"
  # Debian's apptainer needs a newer C library than older releases have, so it gets its own.
  unpack sid "$root" apptainer libc6 libseccomp2 libsqlite3-0

  binary=$root/usr/bin/apptainer starter=$root/usr/lib/$triplet/apptainer/bin/starter
  local own=$root/usr/lib/$triplet
  # Not RUNPATH, patchelf's default: it does not apply to the dependencies of a library.
  quietly "${patchelf[@]}" --force-rpath --set-rpath "$own" --set-interpreter "$own/$loader" \
    "$binary" "$starter" || stop "patchelf"
  quietly "$own/$loader" --list "$binary" || stop "$binary"
  quietly "$own/$loader" --list "$starter" || stop "$starter"
  # Each of the two looks for its configuration and state relative to its own location.
  ln -s ../etc ../var "$root/usr/"
  ln -s ../../etc ../../var "$root/usr/lib/"

  mkdir -p -- "${private%/*}"
  {
    printf '%s\n' '#!/usr/bin/env bash' \
      '# Written by containers/install-apptainer.sh: Apptainer with the tools it starts.'
    # The host's own tools come first: one that belongs to root can do more.
    # shellcheck disable=SC2016  # The wrapper is to expand it.
    if [[ -d $tools/usr/bin ]]; then printf 'export PATH=$PATH:%q\n' "$tools/usr/bin"; fi
    printf 'exec %q "$@"\n' "$binary"
  } >"$private"
  chmod 755 "$private"
  quietly "$private" version || stop "$private"
}

# ---- do it ----------------------------------------------------------------------------------

# apt turns Ctrl-C into an ordinary failure, which would be reported as one.
trap 'note "$prefix: interrupted; the next run starts again"; exit 130' INT TERM
makes_copy=true

# What is here is unfinished, or was moved here from another path.
rm -f -- "$stamp"
find "$prefix/" -mindepth 1 -maxdepth 1 ! -name "${lock_file##*/}" -exec rm -rf -- {} + ||
  fail "APPTAINER_PREFIX=$prefix: the unfinished copy cannot be deleted; delete it, then run this" \
    "again"
make_copy
# The stamp is written last, and atomically.
printf '%s\n' "$stamp_line" >"$stamp.new"
mv -- "$stamp.new" "$stamp"
note "$prefix: ready after $SECONDS s"
answer_with "$private"
