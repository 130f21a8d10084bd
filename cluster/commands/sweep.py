"""`make sweep`: a job once for each point of a grid of settings, at most so many at once.

python -m cluster sweep --job tinyllama --grid "optimizer.lr=1e-5,2e-5 seed=1,2" --max 2

Each point is a run of its own, which saves, requeues and continues by itself. MAX lanes hold them:
jobs of one lane have one name, and Slurm starts one of them at a time (--dependency=singleton); a
job that waits to be requeued keeps its place.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import sys
import time
from dataclasses import replace

from cluster.commands.plan import Plan, plan_new
from cluster.commands.submit import check_trial, submit
from cluster.errors import Parser, split_at_dashes
from cluster.plan.request import Sizes, whole_number
from cluster.remote import calls
from cluster.runs import clusters, history
from cluster.site.file import load_site
from cluster.slurm import notation
from runfolder.errors import UserError, printable

# More are a mistake in the grid, or a job array's work.
MAX_POINTS = 200
MAX_NAME = 100

Point = tuple[tuple[str, str], ...]


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    own, script_arguments = split_at_dashes(argv)
    parser = Parser(
        prog="python -m cluster sweep",
        usage="%(prog)s --grid 'KEY=VALUE,VALUE ...' [OPTION ...] [-- SETTING ...]",
        description="Queue a job once for each point of a grid.",
        allow_abbrev=False,
    )
    parser.add_argument("--job", default="tinyllama", help="a job, as for submit")
    parser.add_argument("--grid", default="", help="settings and their values: 'seed=1,2 x=3,4'")
    parser.add_argument("--max", default="", help="runs at once (all)")
    parser.add_argument("--name", default="", help="the name of the sweep")
    for name in ("accel", "nodes", "gpus", "nproc", "time", "runtime", "image"):
        parser.add_argument(f"--{name}", default="", help="as for submit")
    parser.add_argument("--plan", default="", help="1: show the points, and queue nothing")
    options = parser.parse_args(own)
    if options.plan not in ("", "0", "1"):
        raise UserError(f"PLAN={options.plan}: is not 0 or 1")
    points = points_of(options.grid)
    at_once = at_most(options.max, len(points))
    group = options.name or time.strftime("sweep%m%d%H%M%S")
    site = load_site()
    if site.is_elsewhere:
        return calls.carry_out(site, ["sweep", *argv])
    queue = clusters.chosen(site)
    sizes = Sizes(nodes=options.nodes, gpus=options.gpus, nproc=options.nproc, time=options.time)
    plans: list[Plan] = []
    # All of them are checked before the first is queued.
    for number, (point, name) in enumerate(zip(points, names_of(points, group), strict=True)):
        if sys.stderr.isatty():
            print(f"checking {number + 1} of {len(points)}: {name}", file=sys.stderr)
        options.name = name
        words = [word for key, value in point for word in (f"--{key}", value)]
        like = plans[0] if plans else None
        plan = plan_new(queue, site, sizes, options, [*script_arguments, *words], like=like)
        if isinstance(plan, int):
            return plan
        check_trial(plan)
        plans.append(_in_lane(plan, group, number % at_once, point))
    if options.plan == "1":
        _say_plan(plans, points, at_once)
        return 0
    for done, (plan, point) in enumerate(zip(plans, points, strict=True)):
        try:
            job_id, _ = submit(queue, plan)
        except UserError as error:
            raise UserError(
                f"{error} ({done} of {len(plans)} runs are queued: make cancel NAME={group})"
            ) from None
        run = history.name_of(plan.launch.folder)
        print(f"job {job_id}  {run}  {in_words(point)}", flush=True)
    print(f"{len(plans)} runs, at most {at_once} at once")
    print(f"follow them with: make status NAME={group}")
    return 0


def points_of(grid: str) -> list[Point]:
    """Return the points of a grid, the last setting varying fastest.

    Raises:
        UserError: it is not KEY=VALUE,VALUE ..., or has too many points.
    """
    try:
        words = shlex.split(grid)
    except ValueError as error:
        raise UserError(f"GRID={grid}: {error}") from None
    if not words:
        raise UserError('GRID= is missing; give settings and values: GRID="optimizer.lr=1e-5,2e-5"')
    values: dict[str, list[str]] = {}
    for word in words:
        key, equals, listed = word.partition("=")
        key = key.removeprefix("--")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
            raise UserError(f"GRID: '{printable(word)}' is not KEY=VALUE,VALUE")
        found = listed.split(",")
        if "" in found or len(set(found)) < len(found) or key in values:
            raise UserError(f"GRID: '{printable(word)}' has an empty value, or one twice")
        values[key] = found
    count = math.prod(map(len, values.values()))
    if count > MAX_POINTS:
        raise UserError(f"GRID: has {count:,} points, and a sweep takes at most {MAX_POINTS}")
    pairs = [[(key, value) for value in found] for key, found in values.items()]
    return list(itertools.product(*pairs))


def at_most(given: str, points: int) -> int:
    """Return how many runs may run at once.

    Raises:
        UserError: it is not a number of runs.
    """
    return min(whole_number("MAX", given, 1) or points, points)


def names_of(points: list[Point], group: str) -> list[str]:
    """Return a name for the run of each point: study-lr1e-5-seed2, or a number if that is long."""

    def name(point: Point) -> str:
        parts = (f"{key.rpartition('.')[2]}{value}" for key, value in point)
        return "-".join([group, *(re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in parts)])

    names = [name(point) for point in points]
    if len(set(names)) == len(names) and max(map(len, names)) <= MAX_NAME:
        return names
    return [f"{group}-{number}" for number in range(1, len(points) + 1)]


def in_words(point: Point) -> str:
    """Return a point as it is given: optimizer.lr=1e-5 seed=2."""
    return " ".join(f"{key}={value}" for key, value in point)


def _in_lane(plan: Plan, group: str, lane: int, point: Point) -> Plan:
    *options, script = plan.command
    dependency = "singleton"
    for option in options:
        if option.startswith("--dependency="):
            dependency = f"{option.partition('=')[2]},singleton"
    # Of two options of one name the later counts.
    options += [f"--job-name=sluice-{group}-{lane}", f"--dependency={dependency}"]
    source = plan.launch.source
    record = source.record | {"sweep": {"name": group, "point": dict(point)}}
    launch = replace(plan.launch, source=replace(source, record=record))
    return replace(plan, command=[*options, script], launch=launch)


def _say_plan(plans: list[Plan], points: list[Point], at_once: int) -> None:
    request = plans[0].launch.request
    for plan, point in zip(plans, points, strict=True):
        print(f"{history.name_of(plan.launch.folder)}  {in_words(point)}")
    print(f"each: {request}")
    seconds = notation.seconds(request.time)
    most = ""
    if seconds is not None:
        hours = len(plans) * request.num_nodes * seconds / 3600
        most = f", {hours:,.1f} node-hours at most"
    print(f"{len(plans)} runs, at most {at_once} at once{most}")
    print("nothing was queued or written")
