"""The plan of a job: all that can be resolved and checked before anything is written."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.check import limits
from cluster.check.limits import Judged
from cluster.plan.launch import Launch, resolve_launch
from cluster.plan.request import Request, Sizes, is_dry_run, resolve_request, sbatch_command
from cluster.plan.runtime import choose_runtime, variants
from cluster.plan.source import Source, command_of, new_run, note_surprises, run_that_goes_on
from cluster.runs import clusters, folders, history
from cluster.site import places
from cluster.site.settings import Site
from cluster.slurm.call import PASSED, Slurm
from cluster.slurm.reasons import ACTIVE
from cluster.slurm.refusals import Trial
from runfolder import records
from runfolder.errors import UserError

BATCH_SCRIPT = Path("code/slurm/train.sbatch")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job that passed every check."""

    launch: Launch
    command: list[str]
    environment: dict[str, str]
    """The environment of the command, and so of the job."""
    judged: Judged
    """The job under the site's limits."""
    remarks: list[str]
    trial: Trial
    """What Slurm says about the job without queueing it."""
    cluster: str
    """The cluster that queues it; empty if Slurm does not show it."""


def plan_new(
    queue: Slurm,
    site: Site,
    sizes: Sizes,
    options: Any,
    script_arguments: list[str],
    *,
    like: Plan | None = None,
) -> Plan | int:
    """Return the plan of a new run, or its script's exit code if the script refuses the settings.

    `like`: a plan of the same job and sizes, whose image was checked and whose limits Slurm has
    told; neither is done again.

    Raises:
        UserError: anything that can be found to be wrong before it is queued.
    """
    source = new_run(options.job, name=options.name, accel=options.accel)
    if like is None:
        note_surprises(source, script_arguments)
    resources = source.record["resources"]
    wanted = resolve_request(
        site,
        sizes,
        asked={"num_nodes": resources["nodes"], **resources},
        origin=f"{source.settings}: resources.gpus_per_node",
        on_cpu=is_dry_run(script_arguments),
    )
    said = {
        "NODES": wanted.num_nodes,
        "GPUS": wanted.gpus_per_node,
        "NPROC": wanted.processes_per_node,
        "TIME": wanted.time,
    }
    for variable in ("name", "runtime", "image"):
        if given := getattr(options, variable):
            said[variable.upper()] = given
    record = source.record | {
        "site": asdict(site.slurm) | {"scratch": site.paths.scratch},
        "command": command_of("submit", source, said, script_arguments),
    }
    source = replace(source, record=record)
    return _plan(queue, site, options, wanted, source, script_arguments, like)


def plan_continued(
    queue: Slurm, site: Site, sizes: Sizes, options: Any, script_arguments: list[str]
) -> Plan | int:
    """Return the plan for continuing a run, with its own code and settings.

    Raises:
        UserError: as for a new run; or a job of the run is still in the queue.
    """
    source = run_that_goes_on(options.run, accel=options.accel)
    record = source.record
    last = check_no_job(queue, source.folder, options.run)
    if history.has_finished(source.folder) and not script_arguments:
        raise UserError(
            f"RUN={options.run}: has finished; nothing was queued. To train on, say how far, as in "
            'ARGS="--max_steps 500"'
        )
    on_cpu = bool(yaml.safe_load(source.settings.read_text(encoding="utf-8")).get("dry_run"))
    resources = record["resources"]
    asked = {
        "num_nodes": record.get("num_nodes", 1),
        "gpus_per_node": resources["gpus_per_node"],
        "time": resources["time"],
    }
    if not last:
        # num_processes counts those of all nodes.
        asked["processes_per_node"] = record["num_processes"] // asked["num_nodes"]
    asked |= {key: last[key] for key in (*asked, "processes_per_node") if key in last}
    wanted = resolve_request(site, sizes, asked=asked, origin=f"RUN={options.run}", on_cpu=on_cpu)
    accel = options.accel or last.get("accel") or source.accel
    return _plan(queue, site, options, wanted, replace(source, accel=accel), script_arguments)


def check_no_job(queue: Slurm, folder: Path, name: str) -> dict[str, Any]:
    """Return the newest line of a run's jobs.jsonl, {} if it was never queued.

    Raises:
        UserError: that job is still in the queue, or the line is damaged.
    """
    if not records.was_submitted(folder):
        return {}
    if records.has_damaged_end(folder):
        raise UserError(
            f"{folder / 'jobs.jsonl'}: its last line is damaged, so the newest job is unknown; "
            "if squeue --me lists no job of this run, delete that line"
        )
    newest = records.submissions(folder)[-1]
    known = clusters.at(queue, newest.cluster).jobs([newest.job_id])
    there = history.job_of(folder, newest.job_id, known)
    if there is not None and there.state in ACTIVE:
        raise UserError(
            f"RUN={name}: its job {there.job_id} is {there.state.lower()}; follow it with make "
            "logs, or end it with make cancel"
        )
    return newest.content


def _dependency(queue: Slurm, after: str, cluster: str) -> list[str]:
    """Return the option that makes a job wait for a run; none if that run has finished.

    Raises:
        UserError: the run will not finish by itself, or is on another cluster.
    """
    folder = folders.find(after)
    newest = records.submissions(folder)[-1:]
    if history.has_finished(folder):
        return []
    name = history.name_of(folder)
    if not newest:
        raise UserError(f"after: {name}: was never submitted to Slurm")
    if newest[0].cluster and cluster and newest[0].cluster != cluster:
        raise UserError(
            f"after: {name}: its job is on cluster {newest[0].cluster}, and a job of cluster "
            f"{cluster} cannot wait for it"
        )
    known = clusters.at(queue, newest[0].cluster).jobs([newest[0].job_id])
    job = history.job_of(folder, newest[0].job_id, known)
    if job is None or job.state not in ACTIVE:
        raise UserError(
            f"after: {name}: its job is over, and the run has not finished; continue it first: "
            f"make submit RUN={name}"
        )
    return [f"--dependency=afterok:{job.job_id}"]


def _plan(
    queue: Slurm,
    site: Site,
    options: Any,
    wanted: Request,
    source: Source,
    script_arguments: list[str],
    like: Plan | None = None,
) -> Plan | int:
    folder = source.folder
    if "\\" in str(folder) or not str(folder).isprintable():
        raise UserError(
            f"{places.folder_setting('runs')}: {folder}: Slurm cannot write a log there; choose a "
            "place without a backslash or control characters in its name"
        )
    if like is None:
        rules = limits.read(queue)
        judged, cluster = limits.check(rules, site, wanted), rules.config.get("ClusterName", "")
        runtime = choose_runtime(
            options.runtime or "apptainer",
            options.image,
            variants(gpus=wanted.device == "cuda", strict=True),
        )
    else:
        judged, cluster, runtime = like.judged, like.cluster, like.launch.runtime
    launch = resolve_launch(source, wanted, runtime, script_arguments, site=site)
    if isinstance(launch, int):
        return launch
    name = f"sluice-{source.record['job']}"
    code = places.here() if source.is_new else folder / "code"
    options_of_sbatch = sbatch_command(site, wanted, name=name, folder=folder)
    options_of_sbatch += source.record.get("mail", [])
    remarks = judged.notes
    if source.is_new and (after := source.record["after"]):
        dependency = _dependency(queue, after, cluster)
        options_of_sbatch += dependency
        remarks.append(f"after: {after} {'has to finish first' if dependency else 'has finished'}")
    passed = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key)}
    # The run's folder does not exist yet: `sbatch --test-only` is asked about a job in this one.
    trial = sbatch_command(site, wanted, name=name, folder=places.here())
    trial += judged.for_trial
    # The job itself asks again with these options.
    values = launch.values | {"sbatch_options": "\n".join(trial[1:])}
    return Plan(
        launch=replace(launch, values=values),
        command=[*options_of_sbatch, str(folder / BATCH_SCRIPT)],
        environment=passed | {"SLUICE_RUN_FOLDER": str(folder)},
        judged=judged,
        remarks=remarks,
        trial=queue.trial([*trial, str(code / "slurm/train.sbatch")], passed),
        cluster=cluster,
    )
