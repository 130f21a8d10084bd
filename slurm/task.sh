#!/usr/bin/env bash
# One node's part of a step:  slurm/task.sh check|train|save|clean
# slurm/train.sbatch starts it on every node of the job; what is a node's own is found here.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- this node ----
# Here and not in the batch shell, where it would be the first node's rank for all.
export SLUICE_NODE_RANK=$SLURM_NODEID SLUICE_NODE_NAME=$SLURMD_NODENAME SLUICE_STEP=1
# A site's scratch may be named by variables that only the node has: $SLURM_TMPDIR/sluice.
scratch=${SLUICE_SITE_SCRATCH:?node-local, from site.toml: paths.scratch}
while [[ $scratch =~ \$\{?([A-Za-z_][A-Za-z0-9_]*)\}? ]]; do
  if [[ -z ${!BASH_REMATCH[1]:-} ]]; then
    echo "error: $SLUICE_NODE_NAME: site.toml: paths.scratch: \$${BASH_REMATCH[1]} is not set on" \
      'this node; take a variable that its jobs have' >&2
    exit 2
  fi
  scratch=${scratch/"${BASH_REMATCH[0]}"/"${!BASH_REMATCH[1]}"}
done
# Of this job alone: two jobs on a node must not meet in their caches.
export SLUICE_SCRATCH=$scratch/sluice-$UID-$SLURM_JOB_ID
if [[ $1 == clean ]]; then
  exec rm -rf -- "$SLUICE_SCRATCH"
fi
umask 077
if [[ $1 == save ]]; then
  # For a node that is not so far yet.
  if [[ -d $SLUICE_SCRATCH ]]; then : >"$SLUICE_SCRATCH/save"; fi
  # Slurm's own signals reach every process of a step, where it keeps no cgroups: also the one that
  # serves the image's files, which would die of it in the middle of the save.
  if [[ -f $SLUICE_SCRATCH/launcher.pid ]]; then
    exec kill -s USR1 "$(<"$SLUICE_SCRATCH/launcher.pid")"
  fi
  echo "$SLUICE_NODE_NAME: nothing trains yet, and nothing will"
  exit
fi
# -O: in a folder that all may write, somebody else could have made it.
if ! mkdir -p -- "$SLUICE_SCRATCH" || [[ ! -O $SLUICE_SCRATCH ]]; then
  echo "error: $SLUICE_NODE_NAME: site.toml: paths.scratch: $scratch cannot be used" >&2
  exit 2
fi
umask 022

# ---- what the job reads, nearer ----
if [[ $1 == train && -n ${SLUICE_COPY:-} ]]; then
  started=$SECONDS
  # What an attempt that was killed has left may be half of it.
  rm -rf -- "$SLUICE_SCRATCH/datasets"
  while IFS= read -r name; do
    mkdir -p -- "$SLUICE_SCRATCH/datasets/$(dirname -- "$name")"
    # -L: a link would point to where nothing is, inside.
    cp -rL -- "$SLUICE_DATASETS/$name" "$SLUICE_SCRATCH/datasets/$name"
  done <<<"$SLUICE_COPY"
  export SLUICE_DATASETS=$SLUICE_SCRATCH/datasets
  echo "$SLUICE_NODE_NAME: copied to $SLUICE_DATASETS in $((SECONDS - started)) s"
fi

# ---- go ----
# Only where it finds the real one: Apptainer takes the first of this name.
for place in /usr/local/bin /usr/bin /bin; do
  if [[ -x $place/squashfuse_ll ]]; then PATH=$PWD/slurm/shielded:$PATH; fi
done
case $1 in
train)
  # In this process's place goes what runs the launcher: the one process to be signalled.
  echo "$$" >"$SLUICE_SCRATCH/launcher.pid"
  if [[ -e $SLUICE_SCRATCH/save ]]; then
    echo "$SLUICE_NODE_NAME: asked to save before it began"
    exit 0
  fi
  exec slurm/node.sh --config "$SLUICE_RUN_FOLDER/config.yaml"
  ;;
check)
  # Of an earlier attempt, if that ended with its node.
  rm -f -- "$SLUICE_SCRATCH/launcher.pid" "$SLUICE_SCRATCH/save"
  set --
  # shellcheck source=slurm/environment.sh
  source slurm/environment.sh
  if [[ -n ${SLUICE_IMAGE:-} ]]; then export SLUICE_SCRATCH_INSIDE=/tmp; else
    export SLUICE_SCRATCH_INSIDE=$SLUICE_SCRATCH
  fi
  exec "${python[@]}" slurm/preflight.py check
  ;;
*)
  echo "error: slurm/task.sh $1: is not check, train, save or clean" >&2
  exit 2
  ;;
esac
