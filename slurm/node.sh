#!/usr/bin/env bash
# What runs on each node: the environment, then one launcher for the node's processes.
#   slurm/node.sh SCRIPT_ARGUMENT...
# Called by `make run` and `make dry-run` with one node, and by slurm/task.sh on a cluster.
set -euo pipefail

# ---- what the caller resolved ----
: "${SLUICE_RUN_FOLDER:?}" "${SLUICE_NODE_RANK:?}"
: "${MASTER_ADDR:?the address of the first node}" "${MASTER_PORT:?}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Sets the array `python`; paths among the arguments become those inside the container.
# shellcheck source=slurm/environment.sh
source slurm/environment.sh

# ---- launch ----
: "${num_nodes:?}" "${module:?}"
# The rider counts the steps of whatever module it runs.
exec "${python[@]}" -m slurm.launch \
  --config_file "configs/accelerate/$SLUICE_ACCEL.yaml" \
  --num_machines "$num_nodes" \
  --machine_rank "$SLUICE_NODE_RANK" \
  --num_processes "$SLUICE_WORLD_SIZE" \
  --main_process_ip "$MASTER_ADDR" \
  --main_process_port "$MASTER_PORT" \
  --rdzv_backend static \
  --module train.rider "$module" "$@"
