"""A run, resolved: what `make run`, `make dry-run`, `make submit` and PLAN=1 have in common.

Each of them turns job or run, site, strategy and command line into one `Launch`. It is written to
the run's folder as launch.env, and nothing else reaches `slurm/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.plan import resolve
from cluster.plan.binds import argument_binds, bind, extra_binds, site_bind
from cluster.plan.job import strategy_file
from cluster.plan.request import Request
from cluster.plan.runtime import Runtime, runtime_values
from cluster.plan.source import Source, note_changed_script
from cluster.runs import folders
from cluster.site.settings import Site
from runfolder import files, launch, lock, packages, settings
from runfolder.errors import UserError

# Seconds for saving, if there is no time limit.
SAVE_S = 120
MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run that passed every check, ready to be written and started."""

    source: Source
    request: Request
    runtime: Runtime
    config: str
    """The settings as its script resolved them: config.yaml."""
    values: dict[str, str]
    """What launch.env has for `slurm/`; docs/architecture.md says what each means."""
    exported: dict[str, str]
    """What launch.env has for every process of the run."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.source.folder

    def write(self) -> None:
        """Create the run's folder, or write its new settings; and launch.env.

        Raises:
            UserError: it cannot be written; a run to continue keeps its previous settings.
        """
        if self.source.program:
            # Libraries write to it also without a network: `datasets` what it has read.
            resolve.made(Path(self.values["cache"]), "SLUICE_CACHE")

        def fill(folder: Path) -> None:
            if self.source.program:
                self.source.program.check_copied(folder / "code", self.source.settings)
            files.write_atomically(folder / "config.yaml", self.config)
            launch.write(folder, self.values, self.exported)

        if self.source.is_new:
            folders.create(
                self.folder,
                content=self.record(),
                fill=fill,
                script_folder=self.source.script_folder,
            )
            return
        try:
            # The settings last, because each launch rewrites the other file.
            launch.write(self.folder, self.values, self.exported)
            settings.replace(self.folder, self.config)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None

    def record(self) -> dict[str, Any]:
        """Return what run.json says about a new run."""
        return {
            **self.source.record,
            "accel": self.source.accel,
            "num_nodes": self.request.num_nodes,
            "num_processes": self.request.world_size,
            **self.runtime.record(),
        }


def resolve_launch(
    source: Source,
    request: Request,
    runtime: Runtime,
    script_arguments: list[str],
    *,
    site: Site | None = None,
    is_terminal: bool = False,
) -> Launch | int:
    """Return the launch of a run, or its script's exit code if the script refuses the settings.

    `site`: where its nodes are; None is this machine.

    Raises:
        UserError: anything that can be found to be wrong before it starts.
    """
    strategy_file(source.accel)
    if not source.is_new:
        lock.check_free(source.folder)
        where = f"in {runtime.image.path}" if runtime.image else "on the host"
        if why := packages.changed(source.folder, runtime.extra_packages, where):
            raise UserError(f"{resolve.short(source.folder)}: {why}")
        note_changed_script(source)
    environment = resolve.environment()
    exported = {
        "SLUICE_ACCEL": source.accel,
        "SLUICE_DEVICE": request.device,
        "SLUICE_TERMINAL": "1" if is_terminal else "0",
        "SLUICE_WORLD_SIZE": str(request.world_size),
        "HF_HOME": environment.get("HF_HOME", ""),
        "OMP_NUM_THREADS": str(max(1, request.cpus_per_node // request.processes_per_node)),
        "PET_SHUTDOWN_TIMEOUT": str(site.slurm.save_s if site else SAVE_S),
        "PYTHONUNBUFFERED": "1",
    }
    told = {"HF_HUB_OFFLINE": "1", **exported}
    if request.device == "cpu":
        # Otherwise torch would use the GPUs that it finds.
        told["CUDA_VISIBLE_DEVICES"] = ""
    if source.program:
        config: str | int = resolve.program_settings(
            runtime,
            source.program,
            script_arguments,
            environment | told,
            before=None if source.is_new else source.settings,
            is_copied=source.script_folder is not None,
        )
    else:
        config = resolve.settings(
            runtime,
            source.record["module"],
            ["--config", str(source.settings), *script_arguments],
            environment | told,
            source.code,
        )
    if isinstance(config, int):
        return config
    staged = yaml.safe_load(config)
    if not (source.is_new or source.program):
        resolve.check_goes_on(source.folder, staged)
    return Launch(
        source=source,
        request=request,
        runtime=runtime,
        config=config,
        values=_values(source, request, runtime, staged, site),
        exported=exported | (site.environment if site else {}) | source.environment,
    )


def _values(
    source: Source,
    request: Request,
    runtime: Runtime,
    config: Any,
    site: Site | None,
) -> dict[str, str]:
    datasets, cache = folders.datasets_folder(), resolve.cache_folder()
    values = {
        "module": source.record["module"],
        "num_nodes": str(request.num_nodes),
        "gpus_per_node": str(request.gpus_per_node),
        "datasets": str(datasets),
        "cache": str(cache),
        **runtime_values(runtime),
        "binds": "",
        "container_flags": "",
        "copied_datasets": "",
        "site_variables": "|".join({**(site.environment if site else {}), **source.environment}),
        "save_signal": source.program.signal if source.program else "USR1",
        "interface": "",
    }
    if runtime.image:
        if source.program:
            binds = argument_binds(config["arguments"] + config["resume_arguments"])
        else:
            binds = extra_binds(config, datasets)
        binds += [site_bind(site, text) for text in site.container.binds] if site else []
        values["binds"] = "\n".join(binds)
        for path in (source.folder, source.code, datasets, cache):
            # A path that cannot be bound is reported now, not on the nodes.
            bind(path, path, "ro")
    return values | (_of_site(site, source, runtime, config) if site else {})


def _of_site(site: Site, source: Source, runtime: Runtime, config: Any) -> dict[str, str]:
    copied: list[str] = []
    if site.paths.copy_datasets:
        names = sorted(str(name) for name in (config.get("staged") or {}).values() if name)
        copied = [name for name in names if not Path(name).is_absolute()]
    health = site.preflight
    return {
        "container_flags": "\n".join(site.container.flags) if runtime.image else "",
        "copied_datasets": "\n".join(copied),
        "scratch": site.paths.scratch,
        "modules": "\n".join(site.container.modules),
        "max_restarts": str(source.record["resources"]["max_restarts"]),
        "interface": site.network.interface,
        "address_suffix": site.network.address_suffix,
        "preflight_timeout_s": str(health.timeout_s),
        "floor_bytes_per_second": str(health.all_reduce_floor_mb_per_second * MB),
        "max_clock_skew_s": str(health.max_clock_skew_s),
        "min_free_memory_bytes": str(health.min_free_memory_mb * MB),
        "min_free_gpu_fraction": str(health.min_free_gpu_fraction),
        "min_free_scratch_bytes": str(health.min_free_scratch_mb * MB),
    }
