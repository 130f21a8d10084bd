#!/usr/bin/env bash
# What runs on each node: the environment, then one launcher for the node's processes.
#   slurm/node.sh SCRIPT_ARGUMENT...
# Called by `make run` and `make dry-run` with one node; every variable is resolved by the caller.
# With SLUICE_IMAGE the launcher runs in that image, without it in SLUICE_PYTHON's environment.
set -euo pipefail

# ---- what the caller resolved ----
: "${SLUICE_MODULE:?the training script as a module, such as train.tinyllama}"
: "${SLUICE_ACCEL:?a strategy: the name of a file in configs/accelerate}"
: "${SLUICE_NUM_NODES:?}" "${SLUICE_NODE_RANK:?}" "${SLUICE_WORLD_SIZE:?processes on all nodes}"
: "${SLUICE_MASTER_ADDR:?the address of the first node}" "${SLUICE_MASTER_PORT:?}"
: "${SLUICE_RUN_FOLDER:?}" "${SLUICE_DATASETS:?}" "${SLUICE_SCRATCH:?a folder on this node}"
: "${SLUICE_DEVICE:?cpu or cuda}" "${SLUICE_THREADS:?CPU threads of a process}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- container ----
if [[ -n ${SLUICE_IMAGE:-} ]]; then
  SLUICE_BINDS="$PWD:/workspace:ro
$SLUICE_DATASETS:/datasets:ro
$SLUICE_RUN_FOLDER:/run-folder:rw"
  # Nothing is downloaded here, so that a cache may be missing.
  if [[ -d ${SLUICE_CACHE:-} ]]; then SLUICE_BINDS+=$'\n'$SLUICE_CACHE:/cache:rw; fi
  # Lines as above, for what the job reads elsewhere.
  if [[ -n ${SLUICE_EXTRA_BINDS:-} ]]; then SLUICE_BINDS+=$'\n'$SLUICE_EXTRA_BINDS; fi
  export SLUICE_BINDS SLUICE_WORKDIR=/workspace SLUICE_ONLINE=0
  # From here on a path is one inside.
  set -- "${@/#"$SLUICE_RUN_FOLDER/"//run-folder/}"
  export SLUICE_DATASETS=/datasets SLUICE_RUN_FOLDER=/run-folder HF_HOME=/cache/huggingface
  python=(slurm/container.sh python)
  caches=/tmp
else
  python=("${SLUICE_PYTHON:?the Python that has torch}")
  caches=$SLUICE_SCRATCH
fi

# ---- environment ----
# A package in ~/.local would shadow the locked one.
export PYTHONNOUSERSITE=1
# Compute nodes never reach for a network; what is missing was found before.
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="$SLUICE_THREADS"
# The text is tokenized already; the library's own threads would only warn about forks.
export TOKENIZERS_PARALLELISM=false
# Compilers' caches are for one node: shared file systems corrupt them.
export TRITON_CACHE_DIR=$caches/triton
export TORCHINDUCTOR_CACHE_DIR=$caches/inductor
export TORCH_EXTENSIONS_DIR=$caches/extensions
# On a CPU DeepSpeed would look for a GPU, in the launcher already, and warn that there is none.
if [[ $SLUICE_DEVICE == cpu ]]; then export DS_ACCELERATOR=cpu; fi
# Unless told, the launcher dies of USR1 at once and leaves its processes behind.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
# Seconds that the processes have to save after a signal before they are killed.
export PET_SHUTDOWN_TIMEOUT=120

# ---- launch ----
exec "${python[@]}" slurm/launch.py \
  --config_file "configs/accelerate/$SLUICE_ACCEL.yaml" \
  --num_machines "$SLUICE_NUM_NODES" \
  --machine_rank "$SLUICE_NODE_RANK" \
  --num_processes "$SLUICE_WORLD_SIZE" \
  --main_process_ip "$SLUICE_MASTER_ADDR" \
  --main_process_port "$SLUICE_MASTER_PORT" \
  --rdzv_backend static \
  --module "$SLUICE_MODULE" "$@"
