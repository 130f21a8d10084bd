#!/usr/bin/env bash
# Run a command in the image:  slurm/container.sh OPTION... -- COMMAND...
# The only place that knows Apptainer's options; slurm/node.sh and cluster/plan/container.py call it.
set -euo pipefail

# ---- options ----
# --image: a .sif file; --apptainer: the command; --scratch: a folder on this node, which is /tmp
# inside; --workdir: the current folder inside; --device: cpu or cuda; --binds: lines of
# SOURCE:TARGET:ro or SOURCE:TARGET:rw, parents first; --flags: the site's own options for
# Apptainer, one per line; --pass: names of further variables to pass into the container, joined by
# "|"; --online: it may download; --input: it reads standard input, which is empty otherwise.
image='' apptainer='' scratch='' workdir='' device='' binds='' flags='' pass='' online=no input=no
while [[ ${1:-} == --* ]]; do
  option=$1
  shift
  case $option in
  --) break ;;
  --online) online=yes ;;
  --input) input=yes ;;
  --image=* | --apptainer=* | --scratch=* | --workdir=* | --device=* | --binds=* | --flags=* | --pass=*)
    name=${option%%=*}
    printf -v "${name#--}" %s "${option#*=}"
    ;;
  *)
    echo "error: slurm/container.sh: $option is not an option" >&2
    exit 2
    ;;
  esac
done
: "${image:?}" "${apptainer:?}" "${scratch:?}" "${workdir:?}" "${device:?}" "${binds:?}"

# ---- mounts ----
mounts=()
bind() { # bind SOURCE TARGET ro|rw
  local place=$scratch${2#/tmp} mode=''
  # Apptainer creates no mount points in a folder that is itself bound.
  if [[ $2 == /tmp/* && -d $1 ]]; then
    mkdir -p -- "$place"
  elif [[ $2 == /tmp/* ]]; then
    mkdir -p -- "${place%/*}" && : >>"$place"
  fi
  if [[ $3 == ro ]]; then mode=,ro; fi
  # A line of CSV: quotes protect commas, and quotes inside are doubled.
  mounts+=(--mount "type=bind,\"source=${1//\"/\"\"}\",\"destination=${2//\"/\"\"}\"$mode")
}
bind "$scratch" /tmp rw
while IFS=: read -r source target mode; do
  bind "$source" "$target" "$mode"
done <<<"$binds"
# An empty home, so that nothing from the user's home gets in.
mkdir -p -- "$scratch/home"

# ---- Apptainer's options ----
# Not --contain: it would replace /dev/shm by 64 MB and hide the devices.
options=(--cleanenv --no-eval --no-mount 'tmp,cwd,hostfs' --home "$scratch/home:/tmp/home"
  --pwd "$workdir")
# Root in a container or a restricted shell lacks capabilities that Apptainer would ask for.
if ((EUID == 0)); then options+=(--userns); fi
# Without FUSE only an Apptainer that is installed setuid can mount the image.
if [[ ! -r /dev/fuse || ! -w /dev/fuse ]]; then
  libexec=$("$apptainer" buildcfg | sed -n 's/^LIBEXECDIR=//p')
  if [[ ! -u $libexec/apptainer/bin/starter-suid ]]; then
    options+=(--unsquash)
    echo 'note: no access to /dev/fuse, so the image is unpacked at each start (10 s or more);' \
      'root can: chmod 666 /dev/fuse' >&2
  fi
fi
if [[ $device == cuda ]]; then
  options+=(--nv)
  if [[ -d /dev/infiniband ]]; then bind /dev/infiniband /dev/infiniband rw; fi
fi

# The site's own options, one per line.
if [[ -n $flags ]]; then
  mapfile -t lines <<<"$flags"
  options+=("${lines[@]}")
fi

# ---- environment ----
# The only variables passed into the container. Names ending in _DIR or _HOME are paths inside.
seen='SLUICE_(ACCEL|ATTEMPT|DATASETS|DEVICE|NODE_RANK|PAUSE_AT|RUN_FOLDER|STEP|TERMINAL|WORLD_SIZE)'
seen+='|MASTER_(ADDR|PORT)|SLURMD_NODENAME|PYTHON(UNBUFFERED|NOUSERSITE)'
seen+='|(OMP|KMP|MKL|NCCL|GLOO|FI|UCX|PET|TORCH_NCCL|MALLOC)_[A-Z0-9_]+|DS_ACCELERATOR'
seen+='|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING|DEVICE_MAX_CONNECTIONS)'
seen+='|TORCH_(DISTRIBUTED_DEBUG|CPP_LOG_LEVEL|LOGS|SHOW_CPP_STACKTRACES|EXTENSIONS_DIR)'
seen+='|PYTORCH_(CUDA_)?ALLOC_CONF|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|TOKENIZERS_PARALLELISM'
seen+='|HF_(HOME|HUB_OFFLINE|HUB_DISABLE_(PROGRESS_BARS|TELEMETRY)|DATASETS_DISABLE_PROGRESS_BARS)'
seen+='|HF_UPDATE_DOWNLOAD_COUNTS|TERM|COLUMNS'
# The variables that site.toml sets, joined by "|".
if [[ -n $pass ]]; then seen+="|$pass"; fi
# Tokens, proxies and certificates are only for downloads.
if [[ $online == yes ]]; then
  seen+='|HF_[A-Z0-9_]+|(http|https|ftp|all|no)_proxy|(HTTP|HTTPS|FTP|ALL|NO)_PROXY'
  seen+='|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE'
fi
# The caller's own settings for Apptainer would bind and pass more than is listed here.
for name in "${!APPTAINER@}" "${!SINGULARITY@}"; do
  if [[ ! $name =~ ^APPTAINER_(CACHEDIR|TMPDIR|CONFIGDIR)$ ]]; then unset "$name"; fi
done
# Otherwise Apptainer creates a folder in the user's home, whose quota may be used up, and leaves
# its unpacked files behind when it is killed.
mkdir -p -- "$scratch/apptainer"
export APPTAINER_CONFIGDIR=${APPTAINER_CONFIGDIR:-$scratch/apptainer}
export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$scratch/apptainer}
# By the environment, not by options, which everybody on the machine can read.
while IFS= read -r name; do
  if [[ $name =~ ^($seen)$ ]]; then export "APPTAINERENV_$name=${!name}"; fi
done < <(compgen -e)

# A job's processes must not take what a script around them reads.
if [[ $input == no ]]; then exec </dev/null; fi

# ---- signals ----
# Apptainer passes signals on to the command only when none of its streams is a terminal. It then
# passes on Ctrl+C too, which a terminal sends to the command itself: twice would end the launcher
# before its processes have saved, so the command leaves the terminal.
if [[ ! -t 0 && ! -t 1 && ! -t 2 ]]; then set -- setsid "$@"; fi

exec "$apptainer" --silent exec "${options[@]}" "${mounts[@]}" "$image" "$@"
