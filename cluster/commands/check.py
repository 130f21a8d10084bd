"""`make check`: what the cluster has and what I may use; `make check JOB=`: will this job fit,
and when.
Exit codes of `python -m cluster check --job JOB`: 0 it fits now, 1 it will wait, 2 it can
never run as it is, 3 there is no verdict, because Slurm does not answer.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from cluster.check import finding, overview, verdict
from cluster.check.finding import Finding, Verdict
from cluster.errors import Parser, split_at_dashes
from cluster.plan.image import image_path
from cluster.plan.job import load_job, strategy_file
from cluster.plan.request import Request, Sizes, is_dry_run, resolve_request
from cluster.plan.runtime import variants
from cluster.runs import clusters
from cluster.site.file import load_site
from cluster.slurm.refusals import SlurmError
from runfolder.errors import UserError, printable

NO_VERDICT = 3


def main(argv: list[str]) -> int:
    """Print the overview, or the verdict on a job; return the exit code."""
    own, script_arguments = split_at_dashes(argv)
    parser = Parser(
        prog="python -m cluster check",
        description="What the cluster has and what you may use; with --job, whether a job fits.",
        epilog="With --job the exit code is the verdict: 0 fits now, 1 will wait, 2 can never run; "
        "3: no verdict, because Slurm does not answer.",
        allow_abbrev=False,
    )
    parser.add_argument("--job", default="", help="the name of a file in configs/jobs")
    parser.add_argument("--accel", default="", help="the name of a file in configs/accelerate")
    for name in ("nodes", "gpus", "nproc", "time"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--format", default="table", choices=["table", "json"])
    options = parser.parse_args(own)
    sizes = Sizes(nodes=options.nodes, gpus=options.gpus, nproc=options.nproc, time=options.time)
    if not options.job:
        if sizes != Sizes() or options.accel or script_arguments:
            raise UserError("NODES=, GPUS=, NPROC=, TIME=, ACCEL= and ARGS= need JOB=; name a job")
        return _overview(options.format)
    return _verdict(options, sizes, script_arguments)


def _overview(form: str) -> int:
    site = load_site()
    shown = overview.facts(clusters.chosen(site))
    if form == "json":
        print(json.dumps(shown, indent=2))
        return 0
    # Its library takes a while to load.
    from cluster.check import table

    table.show(shown)
    return 0


def _verdict(options: Any, sizes: Sizes, script_arguments: list[str]) -> int:
    site = load_site()
    job = load_job(options.job)
    if options.accel:
        strategy_file(options.accel)
    on_cpu = is_dry_run(script_arguments)
    try:
        wanted = resolve_request(
            site,
            sizes,
            asked={"num_nodes": job.resources.nodes, **asdict(job.resources)},
            origin=f"{job.path}: resources.gpus_per_node",
            on_cpu=on_cpu,
        )
    except UserError as error:
        # Sizes that no job of this site can have are a verdict too.
        refusal = finding.never(str(error), "request", "")
        answer = verdict.Answer(
            verdict=Verdict.NEVER, findings=[refusal], partition=site.slurm.partition
        )
    else:
        try:
            answer = verdict.on(clusters.chosen(site), site, wanted, job.name)
        except SlurmError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return NO_VERDICT
        answer.remarks.extend(_of_image(wanted))
    if options.format == "json":
        head = {
            "version": overview.VERSION,
            "kind": "verdict",
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "job": job.name,
        }
        print(json.dumps(head | answer.facts(), indent=2))
    else:
        _say(answer, job.name)
    return int(answer.verdict)


def _of_image(wanted: Request) -> list[str]:
    """Return a note if the image is missing; an image that exists is not opened."""
    names = variants(gpus=wanted.device == "cuda", strict=True)
    if any(image_path(name).exists() for name in names):
        return []
    return [
        f"there is no {image_path(names[0])} yet, and make submit needs it: make build-image "
        f"VARIANT={names[0]}"
    ]


def _say(answer: verdict.Answer, job: str) -> None:
    print(f"{job}: {verdict.words(answer)}")
    if answer.request is not None:
        print(f"  job        {answer.request}")
    parts = [f"partition {answer.partition}"]
    parts += [f"account {answer.account}"] if answer.account else []
    parts += [f"QOS {answer.qos}"] if answer.qos else []
    print(f"  where      {printable(', '.join(parts))}")
    for one in answer.findings:
        _say_finding(one)
    for remark in answer.remarks:
        print(f"  note       {printable(remark)}")


def _say_finding(one: Finding) -> None:
    word = {Verdict.FITS: "note", Verdict.WAITS: "waits", Verdict.NEVER: "never"}[one.verdict]
    print(f"  {word:<10} {printable(one.message)}")
    limit = f"{one.limit} of {one.whose}" if one.whose else one.limit
    print(f"             limit: {printable(limit)}")
    if one.fits_with:
        print(f"             fits:  {printable(one.fits_with)}")
