# Sourced by the scripts that run Python on a node: which Python, and with which variables.
# Sets the array `python`: the command that runs Python, in the image or in an environment of the
# host. All else was resolved before, and is in the run's launch.env.
# shellcheck shell=bash disable=SC2034

: "${SLUICE_RUN_FOLDER:?}" "${SLUICE_SCRATCH:?a folder on this node}"
# The caller's values take precedence: a copy of the datasets on this node, or another device.
own_datasets=${SLUICE_DATASETS:-} own_device=${SLUICE_DEVICE:-}
# shellcheck source=/dev/null
source "$SLUICE_RUN_FOLDER/launch.env"
: "${image?}" "${apptainer?}" "${host_python?}" "${datasets:?}" "${cache:?}" "${binds?}"
: "${container_flags?}" "${site_variables?}"
export SLUICE_DATASETS=${own_datasets:-$datasets} SLUICE_DEVICE=${own_device:-$SLUICE_DEVICE}

# ---- container ----
if [[ -n $image ]]; then
  all_binds="$PWD:/workspace:ro
$SLUICE_DATASETS:/datasets:ro
$SLUICE_RUN_FOLDER:/run-folder:rw"
  # Our own scripts write nothing to it here, so it may be missing.
  if [[ -d $cache ]]; then all_binds+=$'\n'$cache:/cache:rw; fi
  # Lines as above, for other paths that the job reads.
  if [[ -n $binds ]]; then all_binds+=$'\n'$binds; fi
  # Where a process that a test pauses reports it (runfolder/moments.py).
  if [[ -n ${SLUICE_PAUSE_AT:-} ]]; then
    all_binds+=$'\n'${SLUICE_PAUSE_AT%/*}:${SLUICE_PAUSE_AT%/*}:rw
  fi
  python=(slurm/container.sh --image="$image" --apptainer="$apptainer" --scratch="$SLUICE_SCRATCH"
    --workdir=/workspace --device="$SLUICE_DEVICE" --binds="$all_binds" --flags="$container_flags"
    --pass="$site_variables" -- python)
  # From here on, paths are those inside the container.
  set -- "${@/#"$SLUICE_RUN_FOLDER/"//run-folder/}"
  export SLUICE_DATASETS=/datasets SLUICE_RUN_FOLDER=/run-folder HF_HOME=/cache/huggingface
  caches=/tmp
else
  python=(slurm/isolated.sh --keep="$site_variables" "$host_python")
  caches=$SLUICE_SCRATCH
fi

# ---- environment ----
# A package in ~/.local would shadow the locked one, also in the image.
export PYTHONNOUSERSITE=1
# Compute nodes never use the internet; missing files were reported before.
export HF_HUB_OFFLINE=1
# The text is tokenized already; the library's own threads would only warn about forks.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# Otherwise every connection from a host whose name does not resolve prints a warning.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Compiler caches must be local to a node: shared file systems corrupt them.
export TRITON_CACHE_DIR=$caches/triton
export TORCHINDUCTOR_CACHE_DIR=$caches/inductor
export TORCH_EXTENSIONS_DIR=$caches/extensions
# On a CPU, DeepSpeed would look for a GPU, even in the launcher, and warn that there is none.
# And torch would use the GPUs that Slurm allocated.
if [[ $SLUICE_DEVICE == cpu ]]; then
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=''
  # glibc would map the large buffers of each step anew, and the kernel clear them: a third of a
  # bf16 step. With these it keeps them, and the process never gives them back.
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-8589934592}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
  export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
fi
# By default, USR1 kills the launcher at once, and its processes stay behind.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
