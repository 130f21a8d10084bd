"""`make submit`: check a job, record it in a run folder, and queue it.

python -m cluster submit --job tinyllama --accel zero2 --nodes 2 -- --max_steps 300
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal

from cluster.check.choice import Choice
from cluster.commands.plan import Plan, plan_continued, plan_new
from cluster.errors import Parser, split_at_dashes
from cluster.plan import fit, resolve
from cluster.plan.request import Sizes
from cluster.remote import calls
from cluster.runs import clusters, history
from cluster.site.file import load_site
from cluster.site.settings import Site
from cluster.slurm.call import Slurm
from cluster.slurm.refusals import NoAnswer, SlurmError, sentences
from runfolder import decision, records, settings
from runfolder.errors import UserError


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    own, script_arguments = split_at_dashes(argv)
    parser = Parser(
        prog="python -m cluster submit",
        usage="%(prog)s [OPTION ...] [-- SETTING ...]",
        description="Queue a job.",
        allow_abbrev=False,
    )
    parser.add_argument("--job", default="tinyllama", help="a file of configs/jobs (tinyllama)")
    parser.add_argument("--accel", default="", help="a file of configs/accelerate (ddp)")
    parser.add_argument("--nodes", default="", help="nodes (default: the job's)")
    parser.add_argument("--gpus", default="", help="GPUs per node (default: the job's)")
    parser.add_argument("--nproc", default="", help="processes per node (one per GPU, or 1)")
    parser.add_argument("--time", default="", help="time limit (default: the job's)")
    parser.add_argument("--run", default="", help="continue this run")
    parser.add_argument("--name", default="", help="a name to find the run by")
    parser.add_argument("--runtime", default="", help="apptainer (default) or host")
    parser.add_argument("--image", default="", help="the image (default: one of images/)")
    parser.add_argument("--plan", default="", help="1: check, say what would be queued, and stop")
    options = parser.parse_args(own)
    if options.plan not in ("", "0", "1"):
        raise UserError(f"PLAN={options.plan}: is not 0 or 1")
    if options.run and options.name:
        raise UserError(f"NAME={options.name}: is for a new run; {options.run} already has one")
    site = load_site()
    if site.is_elsewhere:
        return calls.carry_out(site, ["submit", *argv])
    queue = clusters.chosen(site)
    sizes = Sizes(nodes=options.nodes, gpus=options.gpus, nproc=options.nproc, time=options.time)
    resolve_plan = plan_continued if options.run else plan_new
    plan = resolve_plan(queue, site, sizes, options, script_arguments)
    if isinstance(plan, int):
        return plan
    if options.plan == "1":
        say_plan(queue, plan, site)
        return 0
    job_id, notices = submit(queue, plan)
    folder = plan.launch.folder
    name = history.name_of(folder)
    print(f"run folder {resolve.short(folder)} ({plan.launch.runtime}), job {job_id}")
    for notice in notices:
        print(f"sbatch says: {notice}")
    for remark in plan.remarks:
        print(f"note: {remark}")
    print(f"expected start: {plan.trial}")
    print(f"follow it with: make logs RUN={name}")
    return 0


def submit(queue: Slurm, plan: Plan) -> tuple[int, list[str]]:
    """Write the run's folder, queue its job, and return the job ID and sbatch's other messages.

    If Slurm refuses the job, the folder is removed. If it is unknown whether Slurm took the job,
    the folder stays: a job without its folder would be worse.

    Raises:
        UserError: the folder cannot be written, or Slurm refuses the job.
    """
    # A laptop's connection may be lost at any moment: what is queued has to be recorded.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    launch, folder = plan.launch, plan.launch.folder
    is_new, wanted = launch.source.is_new, launch.request
    try:
        launch.write()
        decision.forget_cancel(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be written: {error.strerror}; nothing was queued"
        ) from None
    try:
        answer = queue.call(*plan.command, environment=plan.environment, with_stderr=True)
    except NoAnswer as error:
        raise _unclear(queue, plan, str(error)) from None
    except KeyboardInterrupt:
        raise _unclear(queue, plan, "interrupted before it answered") from None
    except SlurmError as error:
        if is_new:
            shutil.rmtree(folder)
        else:
            settings.settle(folder, refused=True)
        raise _refused(str(error)) from None
    # Nothing may interrupt this until the job is recorded.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # ID, or ID;CLUSTER if a site has several; the site's own messages may come first.
    found = re.search(r"^(\d+)(?:;(\S*))?$", answer, re.MULTILINE)
    if found is None:
        raise _unclear(queue, plan, f"its answer has no job ID: {answer.strip()[:100]!r}")
    job_id = int(found[1])
    entry = {
        "cluster": found[2] or plan.cluster,
        "accel": launch.source.accel,
        "num_nodes": wanted.num_nodes,
        "num_processes": wanted.world_size,
        "gpus_per_node": wanted.gpus_per_node,
        "processes_per_node": wanted.processes_per_node,
        "time": wanted.time,
        **launch.runtime.record(),
        "command": shlex.join(queue.words(*plan.command)),
    }
    try:
        records.add_submission(folder, job_id, entry)
    except OSError as error:
        end = shlex.join(queue.words("scancel", str(job_id)))
        raise UserError(
            f"{error.filename}: {error.strerror}: job {job_id} is queued but not "
            f"recorded; end it with {end}, make room, and submit again"
        ) from None
    return job_id, [line for line in sentences(answer) if line != found[0]]


def _refused(why: str) -> UserError:
    return UserError(f"sbatch: {why}; nothing was queued")


def _unclear(queue: Slurm, plan: Plan, why: str) -> UserError:
    look = shlex.join(queue.words("squeue", "--me", "--format", "%i %Z"))
    return UserError(
        f"sbatch: {why}; the job may be queued anyway: {look} shows "
        f"the jobs of {plan.launch.folder}, which was left as it is"
    )


def check_trial(plan: Plan) -> None:
    """Raise `UserError` if sbatch would refuse a job, not only at the moment."""
    if plan.trial.refusal and not plan.trial.is_for_now:
        raise _refused(plan.trial.refusal)


def say_plan(queue: Slurm, plan: Plan, site: Site) -> None:
    """Print what would be queued.

    Raises:
        UserError: sbatch would refuse it, and not only at this moment.
    """
    check_trial(plan)
    launch = plan.launch
    source, wanted = launch.source, launch.request
    print(f"plan: {'a new run' if source.is_new else 'continue'} {resolve.short(launch.folder)}")
    print(f"  job        {source.record['job']} ({source.accel}), {wanted}")
    print(f"  runs       {launch.runtime}, on the {'GPU' if wanted.device == 'cuda' else 'CPU'}")
    if wanted.gpus_per_node and site.is_private:
        print("             the GPUs are simulated; the job runs on CPUs")
    where = f" of cluster {queue.cluster}" if queue.cluster else ""
    print(f"  partition  {Choice.from_site(site).partition}{where}")
    print(f"  start      {plan.trial}")
    for notice in plan.trial.notices:
        print(f"  sbatch     {notice}")
    for remark in plan.remarks:
        print(f"  note       {remark}")
    for number, line in enumerate(fit.words(launch, site)):
        print(f"  {'' if number else 'memory':<10} {line}", flush=True)
    print(f"  command    {shlex.join(queue.words(*plan.command))}")
    print("nothing was queued or written")
