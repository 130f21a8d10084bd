"""How much memory a job's processes need, as its script's own side computes it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml

from cluster.plan import container, resolve
from cluster.plan.job import strategy_file
from cluster.plan.launch import Launch
from cluster.site.settings import Site

MIB_PER_GIB = 1024


def words(launch: Launch, site: Site) -> list[str]:
    """Return what a process of a job needs, and what would make it fit; takes some seconds.

    Nothing for a script that is not ours: its memory is unknown.
    """
    source = launch.source
    if source.program:
        return []
    if not (source.code / "train/fit.py").exists():
        return ["not predicted: the run has the code of an earlier version"]
    strategy = yaml.safe_load(strategy_file(source.accel).read_text(encoding="utf-8"))
    environment = resolve.environment() | launch.exported
    environment |= {
        "ACCELERATE_MIXED_PRECISION": strategy.get("mixed_precision", "no"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        config, said = Path(scratch) / "config.yaml", Path(scratch) / "said"
        config.write_text(launch.config, encoding="utf-8")
        container.call(
            launch.runtime,
            "train.fit",
            [
                source.record["module"],
                f"--config={config}",
                f"--gib={_room(launch, site)}",
                f"--said={said}",
            ],
            code=source.code,
            environment=environment,
            writable=[Path(scratch)] if launch.runtime.image else [],
        )
        return said.read_text(encoding="utf-8").splitlines() if said.exists() else []


def _room(launch: Launch, site: Site) -> float:
    """Return the GiB that each process has, as far as site.toml says it; 0: it does not."""
    request = launch.request
    if request.device == "cuda":
        return site.slurm.gpu_memory_gib
    return request.memory_per_node_mb / request.processes_per_node / MIB_PER_GIB
