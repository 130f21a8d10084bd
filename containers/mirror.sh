#!/usr/bin/env bash
# Export this system's apt settings, for a build elsewhere:  containers/mirror.sh FOLDER
#
#   FOLDER   gets host.list and host.sources (the sources of the suite, in apt's two formats),
#            apt.conf (proxies, certificates, limits) and auth.conf (passwords); each only if it has
#            content
#   SUITE    the Debian release (bookworm)
#
# Used for the base (containers/base.sh) and inside an image that is being built.
set -euo pipefail

note() { printf '%s\n' "$*" >&2; }

readonly folder=${1:?the folder} suite=${SUITE:-bookworm}
# apt's output is parsed below.
export LC_ALL=C

if ! type -P apt-config >/dev/null; then exit 0; fi

# ---- sources --------------------------------------------------------------------------------

apt_path() { # apt_path ITEM/KIND: a path from apt's configuration
  local line
  line=$(apt-config shell value "$1")
  # It quotes for a shell; one line is one plain path.
  line=${line#value=\'}
  printf '%s\n' "${line%\'}"
}

# The system's sources of Debian's section main for this suite, its updates and its security
# fixes, unchanged, with their keys and options. A third party's repository may name its suite
# after Debian's, but then it has its own keys.
readonly pick='
function wanted(name) {
  return name == suite || name == suite "-updates" || name == suite "-security"
}
function trusted(keys) { return keys == "" || keys ~ /debian-archive/ }
'
# shellcheck disable=SC2016  # awk expands these.
readonly pick_lines=$pick'
$1 == "deb" {
  keys = ""
  rest = $0
  if (match(rest, /\[[^]]*\]/)) {
    options = substr(rest, RSTART + 1, RLENGTH - 2)
    rest = substr(rest, 1, RSTART - 1) " " substr(rest, RSTART + RLENGTH)
    count = split(options, option, " ")
    for (i = 1; i <= count; i++) if (option[i] ~ /^signed-by=/) keys = option[i]
  }
  sub(/#.*/, "", rest)
  count = split(rest, word, " ")
  section = 0
  for (i = 4; i <= count; i++) if (word[i] == "main") section = 1
  if (wanted(word[3]) && section && trusted(keys)) print
}'
# shellcheck disable=SC2016  # awk expands these.
readonly pick_paragraphs=$pick'
BEGIN { RS = ""; FS = "\n" }
{
  delete value
  others = ""
  for (i = 1; i <= NF; i++) {
    if ($i !~ /^[ \t]/) {
      name = tolower(substr($i, 1, index($i, ":") - 1))
      value[name] = substr($i, index($i, ":") + 1)
      if (name != "suites" && name != "types") others = others $i "\n"
    } else {
      value[name] = value[name] " " $i
      if (name != "suites" && name != "types") others = others $i "\n"
    }
  }
  suites = ""
  count = split(value["suites"], word, " ")
  for (i = 1; i <= count; i++) if (wanted(word[i])) suites = suites " " word[i]
  keys = value["signed-by"]
  gsub(/[ \t]/, "", keys)
  if (suites != "" && trusted(keys) && tolower(value["enabled"]) !~ /no|false|off|0/ &&
      (" " value["types"] " ") ~ / deb / && (" " value["components"] " ") ~ /[ \t]main[ \t]/)
    print "Types: deb\nSuites:" suites "\n" others
}'

readonly list=$folder/host.list paragraphs=$folder/host.sources
: >"$list"
: >"$paragraphs"
is_there() { # is_there FILE: it exists and is readable; a system may lack any of them
  if [[ -f $1 && ! -r $1 ]]; then note "note: $1: not readable for this user; skipped"; fi
  [[ -f $1 && -r $1 ]]
}
parts=$(apt_path Dir::Etc::sourceparts/d)
for file in "$(apt_path Dir::Etc::sourcelist/f)" "${parts%/}"/*.list; do
  if is_there "$file"; then awk -v suite="$suite" "$pick_lines" "$file" >>"$list"; fi
done
for file in "${parts%/}"/*.sources; do
  if is_there "$file"; then
    # A comment inside a paragraph does not end it.
    sed '/^#/d' -- "$file" | awk -v suite="$suite" "$pick_paragraphs" >>"$paragraphs"
  fi
done
for file in "$list" "$paragraphs"; do
  if [[ ! -s $file ]]; then rm -- "$file"; fi
done

# ---- transport ------------------------------------------------------------------------------

# A mirror that does not answer is reported in seconds.
{
  apt-config dump | grep '^Acquire::' |
    grep -v -E '^Acquire::(IndexTargets|Languages|Changelogs|CompressionTypes|Gzip|Retries)' |
    grep -v -E '^Acquire::https?::Timeout'
  printf '%s;\n' 'Acquire::Retries "0"' 'Acquire::http::Timeout "5"' 'Acquire::https::Timeout "5"'
} >"$folder/apt.conf"

parts=$(apt_path Dir::Etc::netrcparts/d)
touch -- "$folder/auth.conf"
chmod 600 -- "$folder/auth.conf"
for file in "$(apt_path Dir::Etc::netrc/f)" "${parts%/}"/*.conf; do
  if is_there "$file"; then cat -- "$file" >>"$folder/auth.conf"; fi
done
if [[ ! -s $folder/auth.conf ]]; then rm -- "$folder/auth.conf"; fi
