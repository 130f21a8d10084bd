# Sourced by what runs the training side on a node: where it runs, and what it sees.
# Sets the array `python`: the command that is Python there. With SLUICE_IMAGE that is in the
# image, without it in SLUICE_PYTHON's environment. Every variable is resolved by the caller.
# shellcheck shell=bash disable=SC2034

: "${SLUICE_RUN_FOLDER:?}" "${SLUICE_DATASETS:?}" "${SLUICE_SCRATCH:?a folder on this node}"
: "${SLUICE_DEVICE:?cpu or cuda}" "${SLUICE_THREADS:?CPU threads of a process}"

# ---- container ----
if [[ -n ${SLUICE_IMAGE:-} ]]; then
  SLUICE_BINDS="$PWD:/workspace:ro
$SLUICE_DATASETS:/datasets:ro
$SLUICE_RUN_FOLDER:/run-folder:rw"
  # Nothing is downloaded here, so that a cache may be missing.
  if [[ -d ${SLUICE_CACHE:-} ]]; then SLUICE_BINDS+=$'\n'$SLUICE_CACHE:/cache:rw; fi
  # Lines as above, for what the job reads elsewhere.
  if [[ -n ${SLUICE_EXTRA_BINDS:-} ]]; then SLUICE_BINDS+=$'\n'$SLUICE_EXTRA_BINDS; fi
  # Where a process that is to stop for a test says so (runfolder/moments.py).
  if [[ -n ${SLUICE_PAUSE_AT:-} ]]; then
    SLUICE_BINDS+=$'\n'${SLUICE_PAUSE_AT%/*}:${SLUICE_PAUSE_AT%/*}:rw
  fi
  export SLUICE_BINDS SLUICE_WORKDIR=/workspace SLUICE_ONLINE=0
  # From here on a path is one inside.
  set -- "${@/#"$SLUICE_RUN_FOLDER/"//run-folder/}"
  export SLUICE_DATASETS=/datasets SLUICE_RUN_FOLDER=/run-folder HF_HOME=/cache/huggingface
  python=(slurm/container.sh python)
  caches=/tmp
else
  python=(slurm/isolated.sh "${SLUICE_PYTHON:?the Python that has torch}")
  caches=$SLUICE_SCRATCH
fi

# ---- environment ----
# A package in ~/.local would shadow the locked one, also in the image.
export PYTHONNOUSERSITE=1
# Compute nodes never reach for a network; what is missing was found before.
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="$SLUICE_THREADS"
# The text is tokenized already; the library's own threads would only warn about forks.
export TOKENIZERS_PARALLELISM=false
# Each connection from a machine whose name nobody resolves would be a warning.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Compilers' caches are for one node: shared file systems corrupt them.
export TRITON_CACHE_DIR=$caches/triton
export TORCHINDUCTOR_CACHE_DIR=$caches/inductor
export TORCH_EXTENSIONS_DIR=$caches/extensions
# On a CPU DeepSpeed would look for a GPU, in the launcher already, and warn that there is none.
# And torch would use the GPUs that Slurm gave.
if [[ $SLUICE_DEVICE == cpu ]]; then export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=''; fi
# Unless told, the launcher dies of USR1 at once and leaves its processes behind.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
# Seconds that the processes have to save after a signal before they are killed.
export PET_SHUTDOWN_TIMEOUT="${SLUICE_SAVE_S:-120}"
