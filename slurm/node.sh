#!/usr/bin/env bash
# What runs on each node: the environment, then one launcher for the node's processes.
#   slurm/node.sh SCRIPT_ARGUMENT...
# Called by `make run` and `make dry-run` with one node, and by slurm/task.sh on a cluster.
set -euo pipefail

# ---- what the caller resolved ----
: "${SLUICE_MODULE:?the training script as a module, such as train.tinyllama}"
: "${SLUICE_ACCEL:?a strategy: the name of a file in configs/accelerate}"
: "${SLUICE_NUM_NODES:?}" "${SLUICE_NODE_RANK:?}" "${SLUICE_WORLD_SIZE:?processes on all nodes}"
: "${SLUICE_MASTER_ADDR:?the address of the first node}" "${SLUICE_MASTER_PORT:?}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where it runs, as the array `python`; paths among the arguments become those inside.
# shellcheck source=slurm/environment.sh
source slurm/environment.sh

# ---- launch ----
exec "${python[@]}" -m slurm.launch \
  --config_file "configs/accelerate/$SLUICE_ACCEL.yaml" \
  --num_machines "$SLUICE_NUM_NODES" \
  --machine_rank "$SLUICE_NODE_RANK" \
  --num_processes "$SLUICE_WORLD_SIZE" \
  --main_process_ip "$SLUICE_MASTER_ADDR" \
  --main_process_port "$SLUICE_MASTER_PORT" \
  --rdzv_backend static \
  --module "$SLUICE_MODULE" "$@"
