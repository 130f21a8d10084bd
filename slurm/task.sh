#!/usr/bin/env bash
# One node's part of a step:  slurm/task.sh check|train|save|clean
# slurm/train.sbatch starts it on every node of the job; node-specific values are set here.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=/dev/null
source "${SLUICE_RUN_FOLDER:?}/launch.env"
: "${scratch:?}" "${datasets:?}" "${copied_datasets?}" "${image?}" "${save_signal:?}"

# ---- this node ----
# Here and not in the batch shell, where it would be the first node's rank for all.
export SLUICE_NODE_RANK=$SLURM_NODEID SLUICE_STEP=1
# A site's scratch may be named by variables that only the node has: $SLURM_TMPDIR/sluice.
while [[ $scratch =~ \$\{?([A-Za-z_][A-Za-z0-9_]*)\}? ]]; do
  if [[ -z ${!BASH_REMATCH[1]:-} ]]; then
    echo "error: $SLURMD_NODENAME: site.toml: paths.scratch: \$${BASH_REMATCH[1]} is not set on" \
      'this node; use a variable that its jobs have' >&2
    exit 1
  fi
  scratch=${scratch/"${BASH_REMATCH[0]}"/"${!BASH_REMATCH[1]}"}
done
# One for each job, because two jobs on a node must not share their caches.
export SLUICE_SCRATCH=$scratch/sluice-$UID-$SLURM_JOB_ID
if [[ $1 == clean ]]; then
  exec rm -rf -- "$SLUICE_SCRATCH"
fi
# One for each attempt: Slurm may start a step that saves when the job runs again.
launcher=$SLUICE_SCRATCH/launcher-$SLUICE_ATTEMPT.pid save=$SLUICE_SCRATCH/save-$SLUICE_ATTEMPT
if [[ $1 == save ]]; then
  # A node that has not begun to train finds this file and does not begin.
  if [[ -d $SLUICE_SCRATCH ]]; then : >"$save"; fi
  # Without cgroups, Slurm's own signals reach every process of a step: also the one that serves the
  # image's files, which would die in the middle of the save.
  if [[ -f $launcher ]]; then
    # A script that is not ours may expect another signal, or none.
    if [[ $save_signal == none ]]; then exit 0; fi
    exec kill -s "$save_signal" "$(<"$launcher")"
  fi
  echo "$SLURMD_NODENAME: attempt $SLUICE_ATTEMPT has not begun to train here, and will not"
  exit
fi
make_scratch() {
  if [[ ! -d $scratch ]]; then
    mkdir -p -- "$(dirname -- "$scratch")" || return
    # For all users, as /tmp is. Another job may just have made it.
    mkdir -m 1777 -- "$scratch" || [[ -d $scratch ]] || return
  fi
  (umask 077 && mkdir -p -- "$SLUICE_SCRATCH") || return
  # In a world-writable folder, somebody else could have made it.
  [[ -O $SLUICE_SCRATCH ]]
}
if ! make_scratch; then
  echo "error: $SLURMD_NODENAME: site.toml: paths.scratch: $scratch cannot be used" >&2
  exit 1
fi

# ---- a copy of the datasets on this node ----
if [[ $1 == train && -n $copied_datasets ]]; then
  started=$SECONDS
  # A killed attempt may have left an incomplete copy.
  rm -rf -- "$SLUICE_SCRATCH/datasets"
  while IFS= read -r name; do
    mkdir -p -- "$SLUICE_SCRATCH/datasets/$(dirname -- "$name")"
    # -L: a link's target would not exist inside.
    cp -rL -- "$datasets/$name" "$SLUICE_SCRATCH/datasets/$name"
  done <<<"$copied_datasets"
  export SLUICE_DATASETS=$SLUICE_SCRATCH/datasets
  echo "$SLURMD_NODENAME: copied to $SLUICE_DATASETS in $((SECONDS - started)) s"
fi

# ---- go ----
# Apptainer uses the first squashfuse_ll on the PATH: ours, if there is a real one to run.
for place in /usr/local/bin /usr/bin /bin; do
  if [[ -x $place/squashfuse_ll ]]; then PATH=$PWD/slurm/shielded:$PATH; fi
done
case $1 in
train)
  # `exec` gives the launcher this process's PID: the one to be signalled.
  echo "$$" >"$launcher"
  if [[ -e $save ]]; then
    echo "$SLURMD_NODENAME: asked to save before training began"
    exit 0
  fi
  exec slurm/node.sh --config "$SLUICE_RUN_FOLDER/config.yaml"
  ;;
check)
  # Left by an attempt that ended with its node: other processes may have these PIDs by now.
  rm -f -- "$SLUICE_SCRATCH"/launcher-*.pid
  set --
  # shellcheck source=slurm/environment.sh
  source slurm/environment.sh
  exec "${python[@]}" -m slurm.preflight check
  ;;
*)
  echo "error: slurm/task.sh $1: is not check, train, save or clean" >&2
  exit 2
  ;;
esac
