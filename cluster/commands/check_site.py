"""`make check-site`: every fault of site.toml at once, and what Slurm says otherwise.

Exit codes of `python -m cluster check-site`: 0 no fault was found, 2 there are some.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from cluster.check import comparison, limits, verdict
from cluster.check.comparison import Comparison
from cluster.check.limits import Rules
from cluster.errors import Parser
from cluster.plan.apptainer import named_by_site
from cluster.plan.binds import site_bind
from cluster.plan.request import Sizes, least_s, resolve_request
from cluster.plan.signature import check_key
from cluster.runs import clusters
from cluster.site.file import SiteError, load_site
from cluster.site.settings import EXAMPLE, FOLDERS, Site
from cluster.site.variables import expanded
from cluster.slurm.call import Slurm
from cluster.slurm.reasons import duration
from cluster.slurm.refusals import POLICY, ControllerUnreachable, DatabaseUnreachable, SlurmError
from runfolder.errors import UserError, printable
from runfolder.exit_codes import EXIT_BAD_INPUT

OF_THE_NODES = (
    "paths.scratch, [network], [preflight], and what [container] names on the nodes: only they can "
    "tell, and each job checks its nodes before it trains"
)


def main(argv: list[str]) -> int:
    """Print what was compared and every fault; return the exit code."""
    Parser(
        prog="python -m cluster check-site",
        description="Every fault of site.toml, and where Slurm says otherwise.",
        allow_abbrev=False,
    ).parse_args(argv)
    try:
        site = load_site()
    except SiteError as error:
        code = _say_faults(error.faults)
        print("not compared with Slurm, until these are corrected", file=sys.stderr)
        return code
    if site.is_private:
        raise UserError(f"site.toml: there is none; cp {EXAMPLE} site.toml, and edit it")
    if site.is_elsewhere:
        return _on_the_cluster(site)
    if shutil.which("sbatch") is None:
        print(f"{site.source}: no fault in the file itself")
        print(
            "not compared: Slurm is not at hand (no sbatch on the PATH); use a login node, or set "
            "ssh.host"
        )
        return 0
    found, heading = _compared(site)
    _show(heading, found)
    return _say_faults(found.faults)


def _on_the_cluster(site: Site) -> int:
    """Have the cluster check the file, too: its paths are there, and Slurm."""
    from cluster.remote import calls

    if site.ssh.config and not Path(site.ssh.config).is_file():
        return _say_faults([f"{site.source}: ssh.config: {site.ssh.config} is not a file"])
    try:
        return calls.carry_out(site, ["check-site"])
    except UserError as error:
        raise UserError(
            f"{site.source}: no fault in the file itself, but it was not compared with Slurm: "
            f"{error}"
        ) from None


def _compared(site: Site) -> tuple[Comparison, str]:
    """Return what was compared on this machine of the cluster, and a heading."""
    queue = clusters.chosen(site)
    found, heading = Comparison(), f"{site.source}, not compared with Slurm"
    try:
        rules = limits.read(queue)
        found = comparison.compare(rules, site)
        if not found.faults:
            found.faults.extend(_as_slurm_says(queue, site, rules))
        version = rules.config.get("SLURM_VERSION", "")
        cluster = rules.config.get("ClusterName", "this cluster")
        heading = f"{site.source} and Slurm {version} of {cluster}, for user {rules.user}"
    except (ControllerUnreachable, DatabaseUnreachable) as error:
        found.not_compared.append(f"[slurm]: {error}")
    except SlurmError as error:
        found.faults.append(f"{site.source}: slurm: Slurm does not answer for it: {error}")
    for kind in FOLDERS:
        if named := getattr(site.paths, kind):
            _folder(found, site, f"paths.{kind}", named)
    checks: list[Callable[[], object]] = [named_by_site]
    if key := site.container.verify_key:
        checks.append(partial(check_key, key, f"{site.source}: container.verify_key"))
    checks += [partial(site_bind, site, text) for text in site.container.binds]
    found.faults.extend(_refusals(checks))
    found.not_compared.append(OF_THE_NODES)
    return found, heading


def _refusals(checks: Iterable[Callable[[], object]]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)


def _as_slurm_says(queue: Slurm, site: Site, rules: Rules) -> Iterator[str]:
    """Have sbatch look at the smallest job with these settings: it knows its options, and plugins.

    A limit on resources is no fault of the file, nor is a refusal that may pass.
    """
    fewest = [rules.partitions[name].min_nodes for name in site.slurm.partition.split(",")]
    asked = {
        "num_nodes": max(1, *fewest),
        "gpus_per_node": min(1, site.slurm.gpus_per_node),
        "time": duration(least_s(site.slurm.save_s)),
    }
    request = resolve_request(site, Sizes(), asked=asked, origin=str(site.source), on_cpu=False)
    trial = verdict.try_it(queue, site, request, "check-site")
    if trial.refusal and not trial.is_for_now and not trial.is_because_of(POLICY):
        yield f"{site.source}: slurm: sbatch refuses a job with these settings: {trial.refusal}"


def _folder(found: Comparison, site: Site, setting: str, named: str) -> None:
    try:
        folder = Path(expanded(site.source, setting, named))
    except UserError as error:
        found.faults.append(str(error))
        return
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    # An image or data may be the site's own, which others only read.
    is_good = existing.is_dir() and (
        (existing == folder and setting != "paths.runs") or os.access(existing, os.W_OK | os.X_OK)
    )
    state = "is there" if existing == folder else "will be made"
    if not is_good:
        state = "is not there, and you cannot make it"
        found.faults.append(
            f"{site.source}: {setting}: {existing} is not a folder that you can write to; choose "
            "another place"
        )
    found.rows.append((setting, str(folder), state))


def _show(heading: str, found: Comparison) -> None:
    # Its library takes a while to load.
    from cluster.check import table

    rows = [[printable(cell) for cell in row] for row in found.rows]
    shown = table.rows_of(["setting", "site.toml", "the cluster"], rows)
    table.show_sections([(printable(heading), shown)])
    for word, lines in (("note", found.notes), ("not compared", found.not_compared)):
        for line in lines:
            print(f"{word}: {printable(line)}")


def _say_faults(faults: Iterable[str]) -> int:
    said = list(dict.fromkeys(map(printable, faults)))
    for fault in said:
        print(f"error: {fault}", file=sys.stderr)
    return EXIT_BAD_INPUT if said else 0
