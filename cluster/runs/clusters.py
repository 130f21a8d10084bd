"""Several clusters with one accounting database: where a job goes, and where a run's job is."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

from cluster.runs import history
from cluster.site.faults import CLUSTER
from cluster.site.flags import CLUSTER_VARIABLES
from cluster.site.settings import Site
from cluster.slurm.call import QueuedJob, Slurm
from cluster.slurm.refusals import SlurmError
from runfolder.errors import UserError
from runfolder.records import Submission


def chosen(site: Site) -> Slurm:
    """Return Slurm on the cluster that jobs go to: slurm.cluster, or what the environment says.

    Raises:
        UserError: there is no Slurm here, or several clusters are named.
    """
    name, where = site.slurm.cluster, f"{site.source}: slurm.cluster"
    for variable in CLUSTER_VARIABLES:
        if not name and os.environ.get(variable):
            name, where = os.environ[variable], variable
    if name and not CLUSTER.fullmatch(name):
        raise UserError(f"{where}: '{name}' is not the name of one cluster; choose one")
    return replace(Slurm.from_site(site), cluster=name)


def at(queue: Slurm, name: str) -> Slurm:
    """Return Slurm on the cluster of that name, as in jobs.jsonl; "" is the local one.

    Raises:
        SlurmError: it does not show which one is local.
    """
    here = replace(queue, cluster="")
    # With --clusters, even a call to the local one would ask the database first.
    return here if not name or name == here.name() else replace(queue, cluster=name)


def look(
    there: Slurm, runs: Mapping[Path, Submission], *, old: Container[Path] = ()
) -> dict[Path, QueuedJob]:
    """Return the jobs of these runs of one cluster, if they are in its queue or ended recently.

    The accounting may know what the queue has forgotten; it is not asked about `old` runs.

    Raises:
        SlurmError: the cluster does not answer.
    """
    found = _matching(runs, there.jobs(last.job_id for last in runs.values()))
    forgotten = {folder: last for folder, last in runs.items() if folder not in found}
    lately = {folder: last for folder, last in forgotten.items() if folder not in old}
    return found | _matching(lately, there.ended(last.job_id for last in lately.values()))


def jobs_of(
    queue: Slurm, wanted: Mapping[Path, Submission], *, old: Container[Path] = ()
) -> tuple[dict[Path, QueuedJob], dict[str, SlurmError]]:
    """Return the jobs of runs of any cluster, each asked once, and which clusters did not answer.

    Raises:
        SlurmError: none of them answers.
    """
    found: dict[Path, QueuedJob] = {}
    silent: dict[str, SlurmError] = {}
    names = {last.cluster for last in wanted.values()}
    for name in sorted(names):
        here = {folder: last for folder, last in wanted.items() if last.cluster == name}
        try:
            found |= look(at(queue, name), here, old=old)
        except SlurmError as error:
            if len(names) == 1:
                raise
            silent[name] = error
    return found, silent


def _matching(
    runs: Mapping[Path, Submission], known: Mapping[int, QueuedJob]
) -> dict[Path, QueuedJob]:
    jobs = {folder: history.job_of(folder, last.job_id, known) for folder, last in runs.items()}
    return {folder: job for folder, job in jobs.items() if job is not None}
