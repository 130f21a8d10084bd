"""The plan of a job: everything resolved and checked that can be, before anything is written."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import clusters, container, history, request, resolve, runs, slurm
from cluster import job as jobs
from cluster import site as sites
from cluster.check import limits
from cluster.reasons import ACTIVE
from cluster.refusals import Trial
from cluster.request import Request, Sizes
from cluster.slurm import PASSED
from runfolder import lock, records
from runfolder.errors import UserError

BATCH_SCRIPT = Path("code/slurm/train.sbatch")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job that passed every check."""

    folder: Path
    record: dict[str, Any]
    """The run.json of a new run, or of the one that goes on."""
    accel: str
    config: str
    request: Request
    runtime: container.Runtime
    command: list[str]
    environment: dict[str, str]
    remarks: list[str]
    trial: Trial
    """What Slurm says of it without queueing it."""
    cluster: str
    """Where it is queued; empty where Slurm does not tell."""
    is_new: bool


def plan_new(
    queue: slurm.Slurm, site: sites.Site, sizes: Sizes, options: Any, script_arguments: list[str]
) -> Plan | int:
    """Return the plan of a new run, or the exit code of its script's refusal.

    Raises:
        UserError: anything that can be known to be wrong before it is queued.
    """
    job = jobs.load(options.job)
    accel = options.accel or "ddp"
    folder = runs.new_folder(job.name, options.name)
    wanted = request.resolve(
        site,
        sizes,
        asked={"num_nodes": job.resources.nodes, **asdict(job.resources)},
        origin=f"{job.path}: resources.gpus_per_node",
        on_cpu=request.is_dry_run(script_arguments),
    )
    words = ["make", "submit", f"JOB={job.name}", f"ACCEL={accel}", f"NODES={wanted.num_nodes}"]
    words += [f"GPUS={wanted.gpus_per_node}", f"NPROC={wanted.processes_per_node}"]
    words += [f"TIME={wanted.time}", f"ARGS={shlex.join(script_arguments)}"]
    for variable in ("name", "runtime", "image"):
        if given := getattr(options, variable):
            words.append(f"{variable.upper()}={given}")
    record: dict[str, Any] = {
        "job": job.name,
        "module": job.module,
        "resources": asdict(job.resources),
        "site": asdict(site.slurm) | {"scratch": site.paths.scratch},
        "command": shlex.join(words),
    }
    settings = ["--config", str(job.path), *script_arguments]
    return _plan(queue, site, options, wanted, accel, folder, record, settings, is_new=True)


def plan_continued(
    queue: slurm.Slurm, site: sites.Site, sizes: Sizes, options: Any, script_arguments: list[str]
) -> Plan | int:
    """Return the plan of a run that goes on, with its own code and settings.

    Raises:
        UserError: as for a new one; and a job of the run is still there.
    """
    folder = runs.find(options.run)
    record = records.read(folder)
    if not (folder / BATCH_SCRIPT).is_file():
        raise UserError(
            f"RUN={options.run}: its code is from before jobs could be submitted; continue it "
            "with make run, or start a new one"
        )
    last: dict[str, Any] = {}
    if records.was_submitted(folder):
        if records.has_damaged_end(folder):
            raise UserError(
                f"{folder / 'jobs.jsonl'}: its last line is damaged, so that the newest job is "
                "not known; delete that line when squeue --me lists no job of this run"
            )
        newest = records.submissions(folder)[-1]
        last = newest.content
        known = clusters.at(queue, newest.cluster).jobs([newest.job_id])
        there = history.job_of(folder, newest.job_id, known)
        if there is not None and there.state in ACTIVE:
            raise UserError(
                f"RUN={options.run}: its job {there.job_id} is {there.state.lower()}; follow it "
                "with make logs, or end it with make cancel"
            )
    lock.check_free(folder)
    settings = folder / "config.yaml"
    on_cpu = bool(yaml.safe_load(settings.read_text(encoding="utf-8")).get("dry_run"))
    resources = record["resources"]
    asked = {
        "num_nodes": record.get("num_nodes", 1),
        "gpus_per_node": resources["gpus_per_node"],
        "time": resources["time"],
    }
    if not last:
        asked["processes_per_node"] = record["num_processes"]
    asked |= {key: last[key] for key in (*asked, "processes_per_node") if key in last}
    wanted = request.resolve(site, sizes, asked=asked, origin=f"RUN={options.run}", on_cpu=on_cpu)
    accel = options.accel or last.get("accel") or record["accel"]
    arguments = ["--config", str(settings), *script_arguments]
    return _plan(queue, site, options, wanted, accel, folder, record, arguments, is_new=False)


def _plan(
    queue: slurm.Slurm,
    site: sites.Site,
    options: Any,
    wanted: Request,
    accel: str,
    folder: Path,
    record: dict[str, Any],
    script_arguments: list[str],
    *,
    is_new: bool,
) -> Plan | int:
    jobs.strategy_file(accel)
    if "\\" in str(folder) or not str(folder).isprintable():
        raise UserError(
            f"{sites.folder_setting('runs')}: {folder}: Slurm cannot write a log there; choose a "
            "place without a backslash or control characters in its name"
        )
    rules = limits.read(queue)
    judged = limits.check(rules, site, wanted)
    code_folder = Path.cwd() if is_new else folder / "code"
    runtime = container.choose(
        options.runtime or "apptainer",
        options.image,
        container.variants(gpus=wanted.device == "cuda", strict=True),
    )
    environment = {
        **resolve.environment(),
        "SLUICE_WORLD_SIZE": str(wanted.world_size),
        "SLUICE_DEVICE": wanted.device,
        "SLUICE_ACCEL": accel,
        "HF_HUB_OFFLINE": "1",
    }
    config = resolve.settings(runtime, record["module"], script_arguments, environment, code_folder)
    if isinstance(config, int):
        return config
    name = f"sluice-{record['job']}"
    batch_script = str((sites.here() / "slurm/train.sbatch") if is_new else folder / BATCH_SCRIPT)
    options_of_sbatch = request.sbatch(site, wanted, name=name, folder=folder)
    passed = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key)}
    # The run's folder is not there yet: `sbatch --test-only` is asked about a job in this one.
    trial = request.sbatch(site, wanted, name=name, folder=sites.here())
    trial += judged.for_trial
    return Plan(
        folder=folder,
        record=record,
        accel=accel,
        config=config,
        request=wanted,
        runtime=runtime,
        command=[*options_of_sbatch, str(folder / BATCH_SCRIPT)],
        environment=passed
        | _variables(site, wanted, runtime, folder, accel, record, yaml.safe_load(config))
        # For another question of that kind, by the job itself.
        | {"SLUICE_SBATCH_OPTIONS": "\n".join(trial[1:])},
        remarks=judged.notes,
        trial=queue.trial([*trial, batch_script], passed),
        cluster=rules.config.get("ClusterName", ""),
        is_new=is_new,
    )


def _variables(
    site: sites.Site,
    wanted: Request,
    runtime: container.Runtime,
    folder: Path,
    accel: str,
    record: dict[str, Any],
    config: Any,
) -> dict[str, str]:
    """Return what slurm/train.sbatch and what it calls want to know, resolved."""
    variables = container.variables(runtime)
    # Each node makes these, as some paths are its own (slurm/environment.sh).
    variables.pop("SLUICE_BINDS", None)
    if runtime.image:
        binds = container.extra_binds(config, runs.datasets_folder())
        binds += [_site_bind(site, text) for text in site.container.binds]
        variables["SLUICE_EXTRA_BINDS"] = "\n".join(binds)
        variables["SLUICE_FLAGS"] = "\n".join(site.container.flags)
        for path in (folder, runs.datasets_folder(), resolve.cache_folder()):
            # A path that cannot be bound is said now, not on the nodes.
            container.bind(path, path, "ro")
    if site.paths.copy_datasets:
        staged = config.get("staged") or {}
        names = sorted(str(name) for name in staged.values() if name)
        variables["SLUICE_COPY"] = "\n".join(n for n in names if not Path(n).is_absolute())
    health = site.preflight
    mb = 1_000_000
    return {
        **variables,
        **site.environment,
        "SLUICE_SITE_VARIABLES": "|".join(site.environment),
        "PYTHONUNBUFFERED": "1",
        "SLUICE_TERMINAL": "0",
        "SLUICE_MODULE": record["module"],
        "SLUICE_ACCEL": accel,
        "SLUICE_RUN_FOLDER": str(folder),
        "SLUICE_DATASETS": str(runs.datasets_folder()),
        "SLUICE_CACHE": str(resolve.cache_folder()),
        "SLUICE_NUM_NODES": str(wanted.num_nodes),
        "SLUICE_WORLD_SIZE": str(wanted.world_size),
        "SLUICE_DEVICE": wanted.device,
        "SLUICE_GPUS_PER_NODE": str(wanted.gpus_per_node),
        "SLUICE_THREADS": str(max(1, wanted.cpus_per_node // wanted.processes_per_node)),
        "SLUICE_MAX_RESTARTS": str(record["resources"]["max_restarts"]),
        "SLUICE_SAVE_S": str(site.slurm.save_s),
        "SLUICE_SITE_SCRATCH": site.paths.scratch,
        "SLUICE_MODULES": "\n".join(site.container.modules),
        "SLUICE_INTERFACE": site.network.interface,
        "SLUICE_ADDRESS_SUFFIX": site.network.address_suffix,
        "SLUICE_FLOOR_BYTES_PER_SECOND": str(health.all_reduce_floor_mb_per_second * mb),
        "SLUICE_MAX_CLOCK_SKEW_S": str(health.max_clock_skew_s),
        "SLUICE_MIN_FREE_MEMORY_BYTES": str(health.min_free_memory_mb * mb),
        "SLUICE_MIN_FREE_GPU_FRACTION": str(health.min_free_gpu_fraction),
        "SLUICE_MIN_FREE_SCRATCH_BYTES": str(health.min_free_scratch_mb * mb),
        "SLUICE_PREFLIGHT_TIMEOUT_S": str(health.timeout_s),
    }


def _site_bind(site: sites.Site, text: str) -> str:
    parts = text.split(":")
    mode = parts.pop() if parts[-1] in ("ro", "rw") else "ro"
    if len(parts) not in (1, 2) or not all(part.startswith("/") for part in parts):
        raise UserError(
            f"{site.source}: container.binds: '{text}' is not SOURCE:TARGET:ro, paths from the root"
        )
    return container.bind(Path(parts[0]), Path(parts[-1]), mode)
