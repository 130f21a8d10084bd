#!/usr/bin/env bash
# Build the image, test it, and write its manifest:  containers/build.sh
#
#   VARIANT  cuda or cpu (cuda)
#   BASE     docker (Debian from Docker Hub); docker://NAME:TAG or docker://NAME@sha256:...;
#            debian (made here from the configured Debian mirror); or a folder or .sif file
#   IMAGE    the file to make (images/sluice-VARIANT.sif)
#   TMPDIR   a folder with space on a local disk (/tmp); APPTAINER_TMPDIR takes precedence
#   CUDA_ARCHITECTURES   the GPUs for which DeepSpeed's ops are compiled (those in apptainer.def)
#   EXTRA    a requirements file: packages to add, in versions that go with the lock
#   COMPRESSION   zstd, or gzip for nodes whose squashfuse is too old for zstd (zstd)
#
# Needs no root. Beside the image it writes the manifest (.json), the list of packages (.txt), the
# SBOM (.cdx.json) and the log (.log).
set -euo pipefail

note() { printf '%s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
readonly here=$PWD

# ---- arguments ------------------------------------------------------------------------------

readonly variant=${VARIANT:-cuda} base=${BASE:-docker}
readonly image=${IMAGE:-${SLUICE_IMAGES:-images}/sluice-$variant.sif}
readonly stem=${image%.sif} architectures=${CUDA_ARCHITECTURES-}
readonly venv=${VENV:-.venv} extra=${EXTRA-} compression=${COMPRESSION:-zstd}

# Measured, in MiB: the base twice, the environment twice, pip's working space, and the image.
case $variant in
cpu) readonly work_mib=6000 image_mib=800 ;;
cuda) readonly work_mib=24000 image_mib=5000 ;;
*) fail "VARIANT=$variant: unknown variant; choose cuda or cpu" ;;
esac
# Measured on the cpu image, 1.9 GB, 2 cores: gzip 121 s and 543 MB, zstd at 9 15 s and 513 MB.
case $compression in
zstd) packing='-comp zstd -Xcompression-level 9' ;;
gzip) packing='' ;;
*) fail "COMPRESSION=$compression: unknown compression; choose zstd or gzip" ;;
esac
if [[ $# -ne 0 ]]; then fail "build.sh: unknown arguments '$*'; it takes variables, see its first lines"; fi
if [[ -n $architectures && ! $architectures =~ ^[0-9]+\.[0-9]+(\ [0-9]+\.[0-9]+)*$ ]]; then
  fail "CUDA_ARCHITECTURES=$architectures: give compute capabilities such as \"8.0 9.0\""
fi
if [[ $image != *.sif ]]; then fail "IMAGE=$image: give the name of a file that ends in .sif"; fi
# It would be stored in the image.
if [[ $base == *://*@*/* || $base == *://*:*@* && $base != *@sha256:* ]]; then
  fail "BASE: an address with a password in it would be stored in the image; use \`apptainer registry login\`"
fi
if [[ -n ${APPTAINER_TMPDIR-} ]]; then
  readonly roomy=APPTAINER_TMPDIR temporary=$APPTAINER_TMPDIR
else
  readonly roomy=TMPDIR temporary=${TMPDIR:-/tmp}
fi
# Apptainer reads them as separators in arguments and binds.
for name in BASE IMAGE "$roomy"; do
  if [[ $name == BASE && $base == docker://* ]]; then continue; fi
  if [[ ${!name-} == *[,:]* ]]; then
    fail "$name=${!name}: contains a comma or a colon; choose a path without"
  fi
done

# ---- can this machine build it? -------------------------------------------------------------

case "$(uname -s) $(uname -m)" in
'Linux x86_64') ;;
*) fail "$(uname -s) $(uname -m): images are built on Linux on x86-64; build there, then copy the file" ;;
esac

if ! unshare --user --map-root-user true 2>/dev/null; then
  fail "user namespaces: $(id -un) may not create them, and a build without root needs them; ask the administrator for user.max_user_namespaces > 0 (Debian: kernel.unprivileged_userns_clone=1; Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0), or build on another machine and copy the file"
elif ((EUID != 0)) &&
  ! { command -v newuidmap >/dev/null && grep -q "^\($(id -un)\|$(id -u)\):" /etc/subuid; } &&
  ! command -v fakeroot >/dev/null; then
  fail "$(id -un): has no line in /etc/subuid, and no fakeroot command is installed; ask the administrator for one of them (usermod --add-subuids, or the package fakeroot)"
fi

apptainer=$(containers/install-apptainer.sh --check) || exit 2
version=$("$apptainer" version)
if [[ $compression == zstd && $(printf '%s\n' 1.4 "$version" | sort -V | head -n 1) != 1.4 ]]; then
  fail "COMPRESSION=zstd: needs Apptainer 1.4 or newer, this is $version; set COMPRESSION=gzip"
fi

free_mib() { # free_mib FOLDER, or its nearest parent that exists
  local folder=$1
  until [[ -d $folder ]]; do folder=$(dirname -- "$folder"); done
  df -Pk -- "$folder" | awk 'NR == 2 {
    for (i = 2; i <= NF; i++) if ($i ~ /%$/) print int($(i - 1) / 1024)
  }'
}

[[ -d $temporary && -w $temporary ]] ||
  fail "$roomy=$temporary: is not a writable folder; set $roomy to one on a local disk"
case $(stat --file-system --format %T -- "$temporary") in
nfs | lustre | gpfs | cifs | smb2 | fuseblk | fhgfs | ceph | panfs | afs)
  fail "$roomy=$temporary: a build on a network file system fails half-way; set $roomy to a folder on a local disk"
  ;;
esac
free=$(free_mib "$temporary")
((free >= work_mib)) ||
  fail "$roomy=$temporary: $free MiB are free, the build needs $work_mib; make room, or set $roomy to a folder on another local disk"
free=$(free_mib "$(dirname -- "$image")")
((free >= image_mib)) ||
  fail "IMAGE=$image: $free MiB are free there, the image needs $image_mib; make room, or set IMAGE to a path on another disk"
mkdir -p -- "$(dirname -- "$image")" 2>/dev/null && [[ -w $(dirname -- "$image") ]] ||
  fail "IMAGE=$image: its folder cannot be written; set IMAGE to a path that can"

"$here/containers/venv.sh" --base
readonly python=$venv/bin/python
requirements=''
if [[ -n $extra ]]; then requirements=$("$python" -I containers/extra.py "$extra") || exit 2; fi

case $base in
docker) reference=docker.io/library/debian:bookworm-slim kind=docker ;;
docker://*) reference=${base#docker://} kind=docker ;;
debian) kind=debian ;;
*)
  kind=local
  [[ -f $base/etc/os-release || (-f $base && $base == *.sif) ]] ||
    fail "BASE=$base: is neither docker, docker://NAME, debian, nor the folder of a root file system or a .sif file"
  ;;
esac
if [[ $kind == docker ]]; then
  if ! answer=$("$python" -I containers/registry.py "$reference" 2>&1); then
    fail "BASE=$base: $answer; check the network, or use BASE=debian, which only needs a Debian mirror"
  fi
  reference=$answer
fi

# ---- a temporary work folder ---------------------------------------------------------------

work=$(mktemp -d -- "$temporary/sluice-build-XXXXXX")
readonly log=$work/build.log
clean_up() {
  # A root file system has folders that even their owner cannot enter.
  if chmod -R u+rwX -- "$work" 2>/dev/null && rm -rf -- "$work"; then return; fi
  # Leftovers of an interrupted build may belong to the user's ids in /etc/subuid.
  unshare --map-root-user --map-auto rm -rf -- "$work" ||
    note "note: $work: could not be deleted completely; delete it"
}
trap clean_up EXIT
trap 'note "interrupted; nothing was changed"; exit 130' INT TERM HUP

# Nothing goes to the home folder: builds fail on its quota.
export APPTAINER_TMPDIR=$work APPTAINER_CACHEDIR=${APPTAINER_CACHEDIR:-$work/cache}

# Do not overwrite the log of the existing image.
keep_log() { cp -- "$1" "$stem.failed.log"; }
stop() { # stop WHAT: show the end of the log, and keep the log
  tail -n 12 -- "$log" | cut -c 1-240 | sed 's/^/  /' >&2
  keep_log "$log"
  fail "$1; the reason is above, the full log in $stem.failed.log"
}

# Shows the steps as they happen; everything goes to the log.
show() { tee -a -- "$log" | sed -unE '/^(\/opt\/[a-z]+: |  [a-z]|ok |FAILED|skipped)/p' >&2; }

# ---- the base -------------------------------------------------------------------------------

note "$image: building ($variant, from $base); about $([[ $variant == cpu ]] && echo 4 || echo 10) minutes"
if [[ -z $extra && -f $stem.json ]] && grep -q '"extra_packages": {$' -- "$stem.json"; then
  note "  note: the image that this replaces has extra packages, and the new one none; EXTRA= adds them"
fi
bootstrap=localimage
case $kind in
docker)
  bootstrap=docker from=$reference digest=${reference##*@}
  # As Docker does: a registry on this very machine needs no certificate.
  if [[ $reference =~ ^(localhost|127\.0\.0\.1)[:/] ]]; then export APPTAINER_NOHTTPS=1; fi
  ;;
debian)
  note "  base from the Debian mirror"
  from=$work/base
  if ! digest=$(BASE_LOG="$stem.failed.log" containers/base.sh "$from"); then exit 2; fi
  rm -- "$stem.failed.log"
  ;;
local)
  from=$(realpath -- "$base")
  if [[ -d $from ]]; then
    digest=$(tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner \
      --exclude=./dev/* --directory "$from" . | sha256sum) ||
      fail "BASE=$base: $(id -un) cannot read all of it (above); make it readable"
  else
    digest=$(sha256sum -- "$from")
  fi
  digest=sha256:${digest%% *}
  ;;
esac

# ---- build ----------------------------------------------------------------------------------

commit=unknown
if git rev-parse --verify --quiet HEAD >/dev/null 2>&1; then
  commit=$(git rev-parse HEAD)
  if [[ -n $(git status --porcelain) ]]; then commit+=-dirty; fi
  # With this, Apptainer 1.5 and later give the same file for the same content.
  SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
  export SOURCE_DATE_EPOCH
fi

# This machine's settings of pip and apt; bound, so that none of them stay in the image.
mkdir -m 700 -- "$work/settings"
binds=(--bind "$work/settings:/mnt")
"$python" -I containers/settings.py "$work/settings" >"$work/binds" || exit 2
if [[ -n $extra ]]; then printf '%s\n' "$requirements" >"$work/settings/extra.txt"; fi
while IFS= read -r bind; do binds+=(--bind "$bind"); done <"$work/binds"

arguments=(--build-arg "BOOTSTRAP=$bootstrap" --build-arg "FROM=$from" --build-arg "VARIANT=$variant"
  --build-arg "BASE_DIGEST=$digest" --build-arg "GIT_COMMIT=$commit")
if [[ -n $architectures ]]; then arguments+=(--build-arg "CUDA_ARCHITECTURES=$architectures"); fi
if [[ -n $packing ]]; then arguments+=(--mksquashfs-args "$packing"); fi

# Only the variables that Apptainer needs: a %post could leave others in the image. In Python,
# because a shell keeps variables with invalid names, and everybody can read env's arguments.
serves='HOME|USER|PATH|LANG|SOURCE_DATE_EPOCH|SSL_CERT_(FILE|DIR)'
serves+='|(https?|no)_proxy|(HTTPS?|NO)_PROXY'
serves+='|APPTAINER_(TMPDIR|CACHEDIR|CONFIGDIR|NOHTTPS|DOCKER_USERNAME|DOCKER_PASSWORD)'
run=("$python" -I -c '
import os, re, sys
serves, *command = sys.argv[1:]
kept = {name: value for name, value in os.environ.items() if re.fullmatch(serves, name)}
os.execve(command[0], command, kept)
' "$serves" "$apptainer")

# Root in a container or a restricted shell lacks capabilities that Apptainer asks for; in a user
# namespace it has all of them. The usual users are mapped, because a base's files have several
# owners; but not all users, or Apptainer takes it for the machine's own root.
as_builder() {
  if ((EUID != 0)); then
    "$@"
    return
  fi
  mkfifo -- "$work/asks" "$work/mapped"
  {
    read -r pid <"$work/asks"
    answer=mapped
    if ! { echo '0 0 65536' >"/proc/$pid/uid_map" && echo '0 0 65536' >"/proc/$pid/gid_map"; }; then
      answer='root may not map users here; build as an ordinary user'
    fi
    echo "$answer" >"$work/mapped"
  } &
  # shellcheck disable=SC2016  # For the inner shell to expand.
  unshare --user bash -c '
    echo $$ >"$0/asks"; read -r answer <"$0/mapped"
    if [[ $answer != mapped ]]; then echo "$answer"; exit 2; fi
    exec "$@"' "$work" "$@"
}

readonly unfinished=$work/${image##*/}
as_builder "${run[@]}" build --notest "${binds[@]}" "${arguments[@]}" "$unfinished" apptainer.def \
  2>&1 | show || {
  # The one line that venv.sh has for it.
  refusal=$(sed -n '/^error: EXTRA: /{s/^error: //p;q}' "$log")
  if [[ -z $refusal ]]; then stop "$image: the build failed"; fi
  keep_log "$log"
  fail "$refusal (log: $stem.failed.log)"
}

# ---- test -----------------------------------------------------------------------------------

inside=(--cleanenv --no-home)
if ((EUID == 0)); then inside+=(--userns); fi
# Without FUSE, an image cannot be mounted; it is unpacked for each of the commands below.
if [[ ! -r /dev/fuse || ! -w /dev/fuse ]]; then inside+=(--unsquash); fi
gpu=()
if compgen -G '/dev/nvidia[0-9]*' >/dev/null; then gpu=(--nv); fi
note "  self-test"
"${run[@]}" test "${inside[@]}" "${gpu[@]}" "$unfinished" 2>&1 | show ||
  stop "$image: the self-test failed"

# ---- write the manifest ---------------------------------------------------------------------

contents=("${run[@]}" exec "${inside[@]}" "$unfinished" cat)
{
  "${contents[@]}" /opt/sluice/share/packages.txt >"$work/packages" &&
    "${contents[@]}" /opt/sluice/share/sbom.cdx.json >"$work/sbom" &&
    "${run[@]}" inspect --json "$unfinished" >"$work/labels"
} 2>>"$log" || stop "$image: its contents cannot be read"
"$python" -I containers/manifest.py "$unfinished" --labels "$work/labels" --packages "$work/packages" \
  --base "$base" --apptainer "$version" >"$work/manifest"

# ---- put it in place ------------------------------------------------------------------------

# Two builds of one image must not mix, and from here on signals are ignored.
exec 8<"$(dirname -- "$image")"
flock 8
trap '' INT TERM HUP
# First across file systems, under another name; jobs may be starting in the existing one. The
# image before its manifest: an image without its own manifest is rejected.
if ! mv -- "$unfinished" "$image.unfinished" || ! mv -- "$image.unfinished" "$image" ||
  ! mv -- "$work/packages" "$stem.txt" || ! mv -- "$work/sbom" "$stem.cdx.json" ||
  ! mv -- "$log" "$stem.log" || ! mv -- "$work/manifest" "$stem.json"; then
  rm -f -- "$image.unfinished"
  fail "IMAGE=$image: could not be put in place; the reason is above"
fi
rm -f -- "$stem.failed.log"
size=$(stat --format %s -- "$image")
note "$image: ready after $SECONDS s, $((size / 1000000)) MB, $(wc -l <"$stem.txt") packages"
