#!/usr/bin/env bash
# Make or refresh a virtual environment from containers/locks:
#
#   containers/venv.sh [--FLAVOUR] [--extra=FILE]
#
#   --base   what the commands of cluster/ need, without torch (seconds, 60 MB)
#   --cpu    also what training needs, with the CPU build of torch: the default
#   --dev    also the tools of `make test` and `make lint`
#   --cuda   what training needs, with the CUDA build of torch (5 GB); for GPUs without an image
#   --nvcc, --sbom    only needed while an image is built
#   --extra=FILE      also the packages that this requirements file names, in versions that go with
#                     the lock; they stay until another FILE is given, also in a new environment
#   VENV     its folder (.venv; a relative path starts at the repository root)
#   PYTHON   the interpreter to make it from (default: the first suitable one on PATH)
#
# Packages come from wherever pip is configured to look (pip.conf, PIP_INDEX_URL, ...).
# If everything is up to date, this returns at once and prints nothing.
set -euo pipefail

# PyTorch's own index of CPU builds, asked only when pip's configured sources have none.
readonly torch_cpu_index=https://download.pytorch.org/whl/cpu
# The Pythons for which every locked package has a wheel, on Linux and on macOS.
readonly python_versions='3.14 3.13 3.12 3.11'
readonly python_range='3.11 to 3.14'
# Measured: base 0.06 GB, cpu 1.6, dev 1.8, cuda 5.0, nvcc 2.0; the rest is pip's working space.
needed_mib() { # needed_mib FLAVOUR
  case $1 in
  base | sbom) echo 300 ;;
  cpu | dev) echo 3000 ;;
  nvcc) echo 4000 ;;
  cuda) echo 9000 ;;
  esac
}

note() { printf '%s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# ---- arguments ------------------------------------------------------------------------------

readonly arguments=$*
flavour=cpu extra=''
case ${1-} in
--base | --cpu | --dev | --cuda | --nvcc | --sbom)
  flavour=${1#--}
  shift
  ;;
esac
if [[ ${1-} == --extra=?* ]]; then
  extra=${1#--extra=}
  shift
fi
readonly flavour extra
# What each flavour includes: dev.txt has all of cpu.txt, and cpu.txt and cuda.txt all of base.txt.
# Only those that train have packages of the user's own.
trains=yes
case $flavour in
dev) readonly holds='base cpu dev' ;;
cpu | cuda) readonly holds="base $flavour" ;;
*)
  readonly holds=$flavour
  trains=''
  ;;
esac
if (($#)) || [[ -n $extra && -z $trains ]]; then
  fail "venv.sh: unknown arguments '$arguments'; use containers/venv.sh [--base|--cpu|--dev|--cuda] [--extra=FILE]"
fi

# CDPATH would send a relative cd elsewhere.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
readonly locks=containers/locks
readonly venv=${VENV:-.venv}
readonly lock_file=$venv/.sluice-lock stamp=$venv/.sluice-stamp
readonly output=$venv/setup.log details=$venv/pip-details.log
# The user's own packages: the requirements, and what pip installed for them, as NAME==VERSION.
readonly requested=$venv/.sluice-extra pinned=$venv/share/extra.txt
readonly locked=$venv/locked.txt before=$venv/extra-before.txt

# Modules on clusters set PYTHONPATH and the like; packages found there would count as installed
# here, and pip starts other Pythons, to which the -I of the first does not apply.
for name in "${!PYTHON@}"; do
  if [[ $name != PYTHON ]]; then unset "$name"; fi
done
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off

# ---- is it there already? -------------------------------------------------------------------

# One line names what a finished environment holds: content, not times, because a checkout or a
# copy changes times. The environment's own interpreter writes it, so one that no longer runs,
# or that is another version since an upgrade of the system, never passes.
readonly key_program='
import hashlib, os, sys
flavour, *files = sys.argv[1:]
digest = hashlib.sha256(b"".join(open(file, "rb").read() for file in files)).hexdigest()
system = os.uname()
print(flavour, system.sysname, system.machine, "python%d.%d" % sys.version_info[:2], digest)
'
key() {
  local files=("$locks/pip.txt" "$locks/$1.txt")
  if [[ $1 == cpu || $1 == dev ]]; then files+=("$locks/torch-cpu.txt"); fi
  if [[ $1 == extra ]]; then files=("$requested" "$pinned"); fi
  # Without site-packages (-S) and the user's settings (-I) this takes 20 ms.
  "$venv/bin/python" -I -S -c "$key_program" "$1" "${files[@]}"
}

is_ready() { # is_ready FLAVOUR
  local line
  [[ -f $stamp && -x $venv/bin/python ]] || return 1
  line=$(key "$1" 2>/dev/null) || return 1
  grep -qxF -e "$line" -- "$stamp"
}

# The CUDA environment can be used for training, too.
has_lock() { is_ready "$flavour" || { [[ $flavour == cpu ]] && is_ready cuda; }; }

has_extra() {
  if [[ -n $extra ]]; then [[ -f $requested && $(<"$requested") == "$requirements" ]] || return 1; fi
  [[ -z $trains || ! -f $requested ]] || is_ready extra
}

serves() { has_lock && has_extra; }

# No lock is taken here: an install removes the stamp before it changes anything.
if [[ -z $extra ]] && serves; then exit 0; fi

# ---- an interpreter -------------------------------------------------------------------------

python='' python_version=''
# A version that is found but does not fit is remembered for the error message.
unfit=''

# The base executable, because `python3` may be this environment's, which is about to be deleted.
readonly probe='
import sys, venv
print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", "") or sys.executable)
'
fits() { # fits COMMAND: does it run, and is it new and old enough? Sets python, python_version.
  local answer version
  answer=$("$1" -I -c "$probe" 2>/dev/null) || return 1
  version=${answer%% *}
  if [[ " $python_versions " != *" $version "* ]]; then
    unfit=$version
    return 1
  fi
  python=${answer#* } python_version=$version
}

find_python() {
  local name path
  if [[ -n ${PYTHON:-} ]]; then
    if fits "$PYTHON"; then return; fi
    if [[ -n $unfit ]]; then
      fail "PYTHON=$PYTHON: this is Python $unfit; set PYTHON to one from $python_range, or unset it"
    fi
    fail "PYTHON=$PYTHON: does not run, or lacks the venv module; set PYTHON to a Python from $python_range, or unset it"
  fi
  for name in python3 ${python_versions//3./python3.}; do
    # All of that name on PATH: the first may be a pyenv shim for a version that is not installed.
    while IFS= read -r path; do
      if fits "$path"; then return; fi
    done < <(type -aP "$name")
  done
  fail "PATH: no Python from $python_range that runs${unfit:+ (Python $unfit is not)}; install one, or set PYTHON to its path"
}
find_python

if [[ -n $extra ]]; then
  requirements=$("$python" -I containers/extra.py "$extra") || exit 2
  if serves; then exit 0; fi
fi

# ---- one at a time --------------------------------------------------------------------------

# Only a folder that this script made, or an empty one, may be cleared.
# Look at its content first: another set-up may be about to create its lock there.
if [[ -d $venv && -n $(ls -A -- "$venv/") && ! -e $lock_file ]]; then
  fail "VENV=$venv: the folder was not made by containers/venv.sh; set VENV to another path, or delete it"
fi
if ! mkdir -p -- "$venv" 2>/dev/null || ! : 2>/dev/null >>"$lock_file"; then
  fail "VENV=$venv: the folder cannot be created or written; set VENV to another path"
fi
exec 9>>"$lock_file"

# The lock belongs to the open file, so it stays with this shell after Python has ended, and with
# a pip that outlives this shell. macOS has no flock command; Python is there in any case.
readonly lock_program='
import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(f"{sys.argv[1]}: waiting for another set-up of it to finish", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as reason:
    print(f"note: {sys.argv[1]}: no lock on this file system ({reason})", file=sys.stderr)
'
"$python" -I -c "$lock_program" "$venv"

# Another set-up may have finished while this one waited.
if serves; then exit 0; fi

# ---- pip, with its output kept in case something fails --------------------------------------

# What pip could not reach, with the reason, which is only in its details: it then reports 'No
# matching distribution'. A 404 is a normal answer: that index has no such package.
unreachable() {
  sed -n -e '/: 404 Client Error/d' \
    -e 's/.*Could not fetch URL \([^ ]*\): \(.*\) - skipping$/\1 could not be reached (\2)/' \
    -e "s/(connection error: .*\(\[Errno [^])]*\][^()']*\).*/(\1)/" \
    -e '/ could not be reached /p' -- "$details" | tail -n 1
}

not_found() { grep -q 'No matching distribution found' -- "$output"; }

# The last lines that pip itself wrote.
last_words() { sed -e '/^$/d' -e 's/^/  /' -- "$output" | tail -n 8 | cut -c 1-240 >&2; }

stop() { # stop WHAT: a step failed
  local reason
  reason=$(unreachable)
  if not_found && [[ -n $reason ]]; then
    fail "$1: $reason; check the network and \`pip config list\`, then run this again"
  fi
  last_words
  fail "$1: could not be installed; the reason is above, the full log in $output"
}

quietly() { "$@" >"$output" 2>&1; }

pip=("$venv/bin/python" -I -m pip)
# A `user = true` in pip.conf would send the packages to the home folder.
install=(install --no-user --no-deps --log "$details")

pip_install() { # pip_install OPTION...: true if pip succeeds
  : >"$details"
  quietly "${pip[@]}" "${install[@]}" "$@"
}

# ---- the empty environment ------------------------------------------------------------------

check_space() { # check_space MIB
  local free_mib
  # In the column before the one with the percent sign, as a device's name may contain spaces.
  if free_mib=$(df -Pk -- "$venv/" 2>/dev/null | awk 'NR == 2 {
      for (i = 2; i <= NF; i++) if ($i ~ /%$/) print int($(i - 1) / 1024)
    }') && [[ -n $free_mib ]] && ((free_mib < $1)); then
    fail "VENV=$venv: $free_mib MiB are free on its file system, $1 are needed; make room, or set VENV to a path on another disk"
  fi
}

# Not `venv --clear`: that would delete the lock too, and a third set-up would lock another file.
clear_folder() {
  find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${lock_file##*/}" ! -name "${requested##*/}" -exec rm -rf -- {} + ||
    fail "VENV=$venv: the old environment cannot be deleted; end what still uses it, then run this again"
}

# The same version of pip everywhere, so that it behaves and reports as tested.
make_empty() {
  local host_pip=("$python" -m pip --python "$venv/bin/python")
  : >"$details"
  if "$python" -I -c 'import ensurepip' 2>/dev/null; then
    quietly "$python" -I -m venv "$venv" || stop "a virtual environment from $python"
  else
    # Debian without its python3-venv package: use the host's pip, or else a download.
    quietly "$python" -I -m venv --without-pip "$venv" || stop "a virtual environment from $python"
    if "${host_pip[@]}" --version >/dev/null 2>&1; then
      pip=("${host_pip[@]}")
    else
      "$venv/bin/python" -I containers/bootstrap_pip.py "$locks/pip.txt"
    fi
  fi
  pip_install --require-hashes -r "$locks/pip.txt" || stop pip
  pip=("$venv/bin/python" -I -m pip)
}

# ---- torch, the CPU build and no other ------------------------------------------------------

# The version is pinned by its name 2.13.0+cpu, which no CUDA build has.
torch_from_a_source() { # torch_from_a_source OPTION...
  local torch="torch $torch_version" asked="pip's configured sources" first='' second=''
  if pip_install "$@"; then return; fi
  # Only when pip looked and did not find it is there a second place to look.
  not_found || stop "$torch"
  first=$(unreachable)
  if [[ $system == Linux ]]; then
    if pip_install --index-url "$torch_cpu_index" "$@"; then return; fi
    not_found || stop "$torch"
    second=$(unreachable)
    asked+=" or $torch_cpu_index"
  fi
  if [[ -n $first$second ]]; then
    : "${first:=not in the configured sources}"
    fail "$torch: $first${second:+, $second}; check the network and \`pip config list\`, then run this again"
  fi
  if grep -q '^Ignoring indexes' -- "$output"; then asked="pip's find-links, as it may use no index"; fi
  fail "$torch: no CPU build for Python $python_version on $system $machine at $asked; set PYTHON to another Python, or provide the wheel through PIP_FIND_LINKS"
}

install_torch() {
  local system machine torch_version
  system=$(uname -s) machine=$(uname -m)
  torch_version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' "$locks/torch-cpu.txt")
  # On macOS the plain build is the CPU build, and PyPI has it.
  if [[ $system != Linux ]]; then torch_version=${torch_version%+cpu}; fi
  note "  torch $torch_version"
  torch_from_a_source --require-hashes -r "$locks/torch-cpu.txt"
  # The lock has hashes for some machines; for the others pip skipped the line.
  if ! "$venv/bin/python" -I -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    note "  note: no hash is locked for torch $torch_version on Python $python_version, $system $machine: this one wheel is installed by its version, without a hash check"
    torch_from_a_source "torch==$torch_version"
  fi
}

# ---- the rest -------------------------------------------------------------------------------

# The lines of a lock that are (or, with !, are not) about one package.
part() { # part LOCK NAME [!]
  awk -v name="^$2==" -v but="${3-}" '/^[^ ]/ {wanted = ($0 ~ name) != (but == "!")} wanted' "$1"
}

install_rest() { # install_rest LOCK
  local file=$venv/part.txt
  if ! grep -q '^deepspeed==' -- "$1"; then
    pip_install --require-hashes --only-binary :all: -r "$1" || stop "$1"
    return
  fi
  # deepspeed is built here from source: its build needs the locked setuptools in the environment,
  # because build isolation would fetch another one without a hash, and torch if it compiles ops.
  # The caller requests these with DeepSpeed's own variables, DS_BUILD_...
  part "$1" deepspeed ! >"$file"
  pip_install --require-hashes --only-binary :all: -r "$file" || stop "$1"
  part "$1" deepspeed >"$file"
  note "  deepspeed"
  DS_BUILD_OPS=0 pip_install --require-hashes --no-build-isolation -r "$file" || stop deepspeed
  rm -- "$file"
}

# ---- packages of the user's own -------------------------------------------------------------

packages() { "${pip[@]}" list --format freeze; }

# Those that are not the lock's.
others() { packages | grep -vxF -f "$locked" || (($? == 1)); }

uninstall() { # uninstall LIST
  if [[ -s $1 ]]; then "${pip[@]}" uninstall --yes --requirement "$1"; fi
}

remove_extra() {
  if [[ ! -f $pinned ]]; then return; fi
  quietly uninstall "$pinned" || stop 'the extra packages'
  mv -- "$pinned" "$before"
}

# pip's own resolver, with the versions of the lock as constraints.
resolve() { "${pip[@]}" install --no-user --log "$details" --constraint "$locked" --requirement "$1"; }

# If pip refuses, the environment is as it was, with the packages that it had.
install_extra() {
  local wanted=$venv/extra-wanted.txt stamped refused='' why='' name
  if [[ -n $extra ]]; then printf '%s\n' "$requirements" >"$wanted"; else cp -- "$requested" "$wanted"; fi
  note "  extra packages"
  stamped=$(sed '/^extra /d' -- "$stamp")
  rm -- "$stamp"
  remove_extra
  packages >"$locked" || fail "$venv: pip cannot list its packages; delete the folder, then run this again"
  mkdir -p -- "${pinned%/*}"
  : >"$details"
  if quietly resolve "$wanted"; then
    others >"$pinned"
    mv -- "$wanted" "$requested"
  else
    refused=yes
    why=$("$python" -I containers/extra.py --explain "$output" "$locked")
    others >"$wanted"
    uninstall "$wanted" &>/dev/null || stop EXTRA
    if [[ -f $before ]] && resolve "$before" &>/dev/null; then others >"$pinned"; fi
  fi
  if [[ -f $pinned ]]; then stamped+=$'\n'$(key extra); fi
  printf '%s\n' "$stamped" >"$stamp.new"
  mv -- "$stamp.new" "$stamp"
  rm -f -- "$before" "$locked" "$wanted"
  if [[ -z $refused ]]; then
    note "  beyond the lock: $(paste -s -d ' ' "$pinned" | sed 's/^$/nothing/')"
    return
  fi
  if [[ -n $why ]]; then fail "EXTRA: $why"; fi
  name=$(sed -n 's/^ERROR: No matching distribution found for //p' "$output" | tail -n 1)
  if [[ -n $name && -z $(unreachable) ]]; then
    fail "EXTRA: $name: pip finds no such package or version for Python $python_version; correct it, or check \`pip config list\`"
  fi
  stop EXTRA
}

# ---- do it ----------------------------------------------------------------------------------

# pip turns Ctrl-C into an ordinary failure, which would be reported as one.
trap 'note "$venv: interrupted; the next run starts again"; exit 130' INT

install_lock() {
  local there='' part lock=$locks/$flavour.txt
  # If all that is there is up to date and part of this flavour, keep it and add to it.
  if [[ -f $stamp ]]; then
    # The last line of a damaged stamp may have no end.
    while read -r part _ || [[ -n $part ]]; do
      if [[ $part == extra ]]; then continue; fi
      if ! is_ready "$part"; then
        there=''
        break
      fi
      if [[ " $holds " != *" $part "* ]]; then
        fail "VENV=$venv: holds the $part environment; set VENV to another path for $flavour, or delete it"
      fi
      there=$part
    done <"$stamp"
  fi
  if [[ -n $there ]]; then
    note "$venv: adding what $lock has in addition to $there"
    check_space $(($(needed_mib "$flavour") - $(needed_mib "$there") + 500))
    rm -- "$stamp"
    # One of them may be in this lock, in another version.
    remove_extra
  else
    # What is here is unfinished or out of date.
    rm -f -- "$stamp"
    clear_folder
    note "$venv: installing the $flavour environment with Python $python_version (once)"
    check_space "$(needed_mib "$flavour")"
    make_empty
  fi
  if [[ ($flavour == cpu || $flavour == dev) && $there != cpu ]]; then install_torch; fi
  note "  $lock ($(grep -c '^[^ ]' "$lock") packages)"
  install_rest "$lock"
  if ! quietly "${pip[@]}" check; then
    last_words
    fail "$venv: the locked packages are incompatible on this machine (above); please report it"
  fi

  # The stamp is written last, and atomically.
  for part in $holds; do key "$part"; done >"$stamp.new"
  mv -- "$stamp.new" "$stamp"
}

if ! has_lock; then install_lock; fi
if ! has_extra; then install_extra; fi
rm -f -- "$output" "$details"
note "$venv: ready after $SECONDS s"
