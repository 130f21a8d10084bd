#!/usr/bin/env bash
# Run a command in the image:  slurm/container.sh COMMAND...
# The only place that knows Apptainer's options; slurm/node.sh and cluster/container.py call it.
set -euo pipefail

# ---- what the caller resolved ----
: "${SLUICE_APPTAINER:?the command apptainer}" "${SLUICE_IMAGE:?the image, a .sif file}"
: "${SLUICE_BINDS:?lines of SOURCE:TARGET:ro or SOURCE:TARGET:rw, parents first}"
: "${SLUICE_SCRATCH:?a folder on this node, which is /tmp inside}"
: "${SLUICE_WORKDIR:?the current folder inside}" "${SLUICE_DEVICE:?cpu or cuda}"

# ---- mounts ----
mounts=()
bind() { # bind SOURCE TARGET ro|rw
  local place=$SLUICE_SCRATCH${2#/tmp} mode=''
  # Nothing makes a mount point in a folder that is bound itself.
  if [[ $2 == /tmp/* && -d $1 ]]; then
    mkdir -p -- "$place"
  elif [[ $2 == /tmp/* ]]; then
    mkdir -p -- "${place%/*}" && : >>"$place"
  fi
  if [[ $3 == ro ]]; then mode=,ro; fi
  # A line of CSV, in which quotes keep commas and are doubled themselves.
  mounts+=(--mount "type=bind,\"source=${1//\"/\"\"}\",\"destination=${2//\"/\"\"}\"$mode")
}
bind "$SLUICE_SCRATCH" /tmp rw
while IFS=: read -r source target mode; do
  bind "$source" "$target" "$mode"
done <<<"$SLUICE_BINDS"
# An empty home, so that nothing of the user's own gets in.
mkdir -p -- "$SLUICE_SCRATCH/home"

# ---- options ----
# Not --contain: it would replace /dev/shm by 64 MB and hide the devices.
options=(--cleanenv --no-eval --no-mount 'tmp,cwd,hostfs' --home "$SLUICE_SCRATCH/home:/tmp/home"
  --pwd "$SLUICE_WORKDIR")
# Root in a container or a restricted shell lacks capabilities that Apptainer would ask for.
if ((EUID == 0)); then options+=(--userns); fi
# Without FUSE only an Apptainer that is installed setuid can mount the image.
if [[ ! -r /dev/fuse || ! -w /dev/fuse ]]; then
  libexec=$("$SLUICE_APPTAINER" buildcfg | sed -n 's/^LIBEXECDIR=//p')
  if [[ ! -u $libexec/apptainer/bin/starter-suid ]]; then
    options+=(--unsquash)
    echo 'note: /dev/fuse is closed to this user, so the image is unpacked at each start (10 s or' \
      'more); root can: chmod 666 /dev/fuse' >&2
  fi
fi
if [[ $SLUICE_DEVICE == cuda ]]; then
  options+=(--nv)
  if [[ -d /dev/infiniband ]]; then bind /dev/infiniband /dev/infiniband rw; fi
fi

# What the site wants besides, an option in each line.
if [[ -n ${SLUICE_FLAGS:-} ]]; then
  mapfile -t flags <<<"$SLUICE_FLAGS"
  options+=("${flags[@]}")
fi

# ---- environment ----
# What is seen inside; all else stays outside. Names ending in _DIR or _HOME are paths inside.
seen='SLUICE_(ATTEMPT|DATASETS|DEVICE|RUN_FOLDER|TERMINAL|WORLD_SIZE)|PYTHON(UNBUFFERED|NOUSERSITE)'
seen+='|SLUICE_(STEP|NUM_NODES|NODE_(RANK|NAMES?)|MASTER_(ADDR|PORT)|INTERFACE|GPUS_PER_NODE)'
seen+='|SLUICE_(MAX_(RESTARTS|CLOCK_SKEW_S)|MIN_FREE_[A-Z_]+|FLOOR_BYTES_PER_SECOND)'
seen+='|SLUICE_(SCRATCH_INSIDE|PREFLIGHT_TIMEOUT_S|PAUSE_AT)'
seen+='|(OMP|KMP|MKL|NCCL|GLOO|FI|UCX|PET|TORCH_NCCL)_[A-Z0-9_]+|DS_ACCELERATOR'
seen+='|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING|DEVICE_MAX_CONNECTIONS)'
seen+='|TORCH_(DISTRIBUTED_DEBUG|CPP_LOG_LEVEL|LOGS|SHOW_CPP_STACKTRACES|EXTENSIONS_DIR)'
seen+='|PYTORCH_(CUDA_)?ALLOC_CONF|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|TOKENIZERS_PARALLELISM'
seen+='|HF_(HOME|HUB_OFFLINE|HUB_DISABLE_(PROGRESS_BARS|TELEMETRY)|DATASETS_DISABLE_PROGRESS_BARS)'
seen+='|HF_UPDATE_DOWNLOAD_COUNTS|TERM|COLUMNS'
# What the site's own file sets, names joined by "|".
if [[ -n ${SLUICE_SITE_VARIABLES:-} ]]; then seen+="|$SLUICE_SITE_VARIABLES"; fi
# Tokens, proxies and certificates are for downloads alone.
if [[ ${SLUICE_ONLINE:-0} == 1 ]]; then
  seen+='|HF_[A-Z0-9_]+|(http|https|ftp|all|no)_proxy|(HTTP|HTTPS|FTP|ALL|NO)_PROXY'
  seen+='|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE'
fi
# What the caller has set for Apptainer would bind and pass more than is said here.
for name in "${!APPTAINER@}" "${!SINGULARITY@}"; do
  if [[ ! $name =~ ^APPTAINER_(CACHEDIR|TMPDIR|CONFIGDIR)$ ]]; then unset "$name"; fi
done
# Or it would make a folder in the user's home, whose quota may be used up, and leave behind what
# it unpacks when it is killed.
mkdir -p -- "$SLUICE_SCRATCH/apptainer"
export APPTAINER_CONFIGDIR=${APPTAINER_CONFIGDIR:-$SLUICE_SCRATCH/apptainer}
export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$SLUICE_SCRATCH/apptainer}
# By the environment, not by options, which everybody on the machine can read.
while IFS= read -r name; do
  if [[ $name =~ ^($seen)$ ]]; then export "APPTAINERENV_$name=${!name}"; fi
done < <(compgen -e)

# ---- signals ----
# Apptainer passes signals on to the command only when none of its streams is a terminal. It then
# passes on Ctrl+C too, which a terminal sends to the command itself: twice would end the launcher
# before its processes have saved, so the command leaves the terminal.
if [[ ! -t 1 && ! -t 2 ]]; then set -- setsid "$@"; fi

exec "$SLUICE_APPTAINER" --silent exec "${options[@]}" "${mounts[@]}" "$SLUICE_IMAGE" "$@" </dev/null
