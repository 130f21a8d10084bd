"""Slurm's job states, and its reasons why a job waits, in plain words with what to do.

The codes are those of `man squeue` (JOB REASON CODES, JOB STATE CODES) and of Slurm's sources.
"""

from __future__ import annotations

import re
import shlex
import time
from fnmatch import fnmatchcase

from runfolder.errors import printable

# What squeue says about a job that is not over, and what that means. REQUEUED and the like appear
# only for a moment.
ACTIVE = {
    "PENDING": "waiting",
    "REQUEUED": "queued again",
    "REQUEUE_FED": "queued again",
    "REQUEUE_HOLD": "held",
    "RESV_DEL_HOLD": "held",
    "SPECIAL_EXIT": "held",
    "CONFIGURING": "starting",
    "POWER_UP_NODE": "starting",
    "RUNNING": "running",
    "RESIZING": "running",
    "SIGNALING": "running",
    "COMPLETING": "saving",
    "STAGE_OUT": "saving",
    "SUSPENDED": "suspended",
    "STOPPED": "suspended",
}
WAITING = {state for state, word in ACTIVE.items() if word in ("waiting", "queued again", "held")}

OVER = {
    "COMPLETED": "it ended",
    "CANCELLED": "it was cancelled",
    "FAILED": "its batch script failed",
    "TIMEOUT": "it reached its time limit before it could save",
    "NODE_FAIL": "a node failed",
    "PREEMPTED": "a job of higher priority preempted it",
    "OUT_OF_MEMORY": "a node ran out of memory",
    "BOOT_FAIL": "a node did not start",
    "DEADLINE": "its deadline passed",
    "REVOKED": "another cluster of the federation runs it",
    "LAUNCH_FAILED": "it could not be started on its nodes",
    "RECONFIG_FAIL": "a node could not be set up for it",
}

RESUBMIT = "it will never start: cancel it, and submit it with"
# The first that matches is taken, so exact names and narrow patterns stand above wide ones.
REASONS = (
    ("None", "Slurm has not looked at it yet"),
    ("Resources", "the nodes that it needs are busy; it is next in the queue"),
    (
        "Priority",
        "other jobs are ahead of it in the queue; with fewer NODES= or a shorter TIME= it may "
        "start sooner",
    ),
    ("DependencyNeverSatisfied", "the job that it depends on did not end as required; cancel it"),
    ("Dependency", "another job must end first"),
    ("BeginTime", "waits for its begin time; after a requeue that is about two minutes"),
    ("JobHeldUser", "you put it on hold; {release} releases it"),
    ("JobHeldAdmin", "an administrator put it on hold; ask the site's support"),
    (
        "launch?failed?requeued?held",
        "it could not be started and is held: a node may be broken; {release} tries again",
    ),
    ("job?requeued?in?held?state", "it is on hold; {release} releases it"),
    ("PartitionTimeLimit", f"its TIME is above the partition's limit; {RESUBMIT} a shorter TIME="),
    (
        "Partition*Node*",
        f"the partition does not allow that many nodes per job; {RESUBMIT} other NODES=",
    ),
    ("PartitionDown", "the partition is down; wait, or ask the site's support"),
    ("PartitionInactive", "the partition starts no jobs at present; wait, or ask the site"),
    ("PartitionConfig", f"the partition cannot provide what it asks for; {RESUBMIT} less"),
    (
        "ReqNodeNotAvail*",
        "nodes that it needs are down, drained or reserved ({code}); wait, or submit with a "
        "shorter TIME= if maintenance is coming up",
    ),
    (
        "Nodes?required?for?job?are*",
        "nodes that it needs are down, drained or reserved for others; make check shows free ones",
    ),
    ("NodeDown", "a node that it needs is down; wait, or ask the site's support"),
    ("ReservationDeleted", "its reservation was deleted; cancel it and submit it without one"),
    ("Reservation", "its reservation has not started, or is full"),
    ("BadConstraints", f"no node has what it asks for; {RESUBMIT} other sbatch_flags in site.toml"),
    ("InvalidAccount", f"its account is no longer valid; {RESUBMIT} another slurm.account"),
    ("AccountNotAllowed", f"its account may not use the partition; {RESUBMIT} another account"),
    ("InvalidQOS", f"its QOS is no longer valid; {RESUBMIT} another slurm.qos in site.toml"),
    ("QOSNotAllowed", f"its QOS may not use the partition; {RESUBMIT} another slurm.qos"),
    ("Licenses", "the licenses that it asks for are in use"),
    ("JobArrayTaskLimit", "others of its array run; it starts when one of them ends"),
    ("BurstBuffer*", "the burst buffer is not ready for it"),
    ("Prolog*", "its nodes are being prepared"),
    ("Cleaning", "its last attempt is still being cleaned up"),
    ("SchedDefer", "Slurm has not looked at it yet"),
    ("QOSUsageThreshold", "its QOS has used its share; it waits until that recovers"),
    ("QOSMaxWall*", f"its TIME is above its QOS's limit; {RESUBMIT} a shorter TIME="),
    ("AssocMaxWall*", f"its TIME is above your account's limit; {RESUBMIT} a shorter TIME="),
    ("*TimeLimit", f"its TIME is above a limit of yours ({{code}}); {RESUBMIT} a shorter TIME="),
    ("*Max*Minutes*PerJob*", f"NODES x TIME is above a limit ({{code}}); {RESUBMIT} less of both"),
    ("*Max*PerJob*", f"it is more than one job may use ({{code}}); {RESUBMIT} fewer NODES="),
    ("*Max*PerNode*", f"it is more than a job may use per node ({{code}}); {RESUBMIT} fewer GPUS="),
    ("QOSMin*", f"it is too small for its QOS ({{code}}); {RESUBMIT} more, or another slurm.qos"),
    (
        "*Max*PerUser*",
        "you have reached the limit per user ({code}); it starts when one of your jobs ends",
    ),
    ("*Max*PerAccount*", "your account has reached its limit ({code}); it starts when a job ends"),
    ("AssocMax*", "you have reached your limit ({code}); it starts when one of your jobs ends"),
    (
        "*Grp*RunMin*",
        "running jobs have used up the limit on their remaining time ({code}); it starts when they "
        "have less left",
    ),
    ("AssocGrp*Minutes*", "your account's time is used up ({code}); ask the account's coordinator"),
    ("QOSGrp*Minutes*", "its QOS's time is used up ({code}); ask the site, or use another QOS"),
    (
        "AssocGrp*",
        "your account's jobs have reached its limit ({code}); it starts when one of them ends",
    ),
    ("QOSGrp*", "the jobs of its QOS have reached its limit ({code}); it starts when one ends"),
    ("*Limit", "you have reached a limit ({code}); it starts when one of your jobs ends"),
    ("SystemFailure", "Slurm itself failed; ask the site's support"),
)


def why(code: str, job_id: int, cluster: str = "") -> str:
    """Return in plain words why a job waits; an unknown code stays as it is.

    `cluster`: the one that has the job, of several; empty: the local one.
    """
    shown = printable(code)
    words = ["scontrol", *([f"--clusters={cluster}"] if cluster else []), "release", str(job_id)]
    release = shlex.join(words)
    for pattern, meaning in REASONS:
        if fnmatchcase(code, pattern):
            return meaning.format(release=release, code=shown.replace("_", " "))
    return shown


def clock(moment: str, now: float | None = None) -> str:
    """Return one of Slurm's local times for people: 10:05, Tue 10:05, 2026-12-01 10:05.

    `now`, in seconds since the epoch, is used instead of the current time.
    """
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d)?", moment):
        return ""
    day, _, hour = moment[:16].partition("T")
    now = time.time() if now is None else now
    for distance in (0, 1, -1, 2, 3, 4, 5):
        if day == time.strftime("%Y-%m-%d", time.localtime(now + distance * 86400)):
            name = time.strftime("%a ", time.localtime(now + distance * 86400))
            return hour if distance == 0 else name + hour
    return f"{day} {hour}"


def waits(code: str, start: str, job_id: int, cluster: str = "") -> str:
    """Return why a job waits, and until when as far as Slurm knows."""
    expected = clock(start)
    return why(code, job_id, cluster) + (f"; expected start {expected}" if expected else "")


def duration(seconds: float) -> str:
    """Return a duration as Slurm writes it: 0:40:00, 1-02:00:00."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (
        f"{days}-{hours:02}:{minutes:02}:{secs:02}" if days else f"{hours}:{minutes:02}:{secs:02}"
    )
