"""Slurm's words for what a job does and why it waits, in plain words with what to do.

The codes are those of `man squeue` (JOB REASON CODES, JOB STATE CODES) and of Slurm's sources.
"""

from __future__ import annotations

import re
import shlex
import time
from fnmatch import fnmatchcase

from runfolder.errors import printable

# What squeue says of a job that is not over, and what that means. REQUEUED and the like appear for
# moments only.
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
    "TIMEOUT": "its time limit ended it before it could save",
    "NODE_FAIL": "a node failed",
    "PREEMPTED": "a job of higher priority took its nodes",
    "OUT_OF_MEMORY": "a node's memory was used up",
    "BOOT_FAIL": "a node did not start",
    "DEADLINE": "its deadline passed",
    "REVOKED": "another cluster of the federation runs it",
    "LAUNCH_FAILED": "it could not be started on its nodes",
    "RECONFIG_FAIL": "a node could not be set up for it",
}

RESUBMIT = "it never starts so: cancel it, and submit it with"
# The first that matches is taken, so exact names and narrow patterns stand above wide ones.
REASONS = (
    ("None", "Slurm has not looked at it yet"),
    ("Resources", "the nodes that it wants are busy; it is next in line"),
    ("Priority", "others are before it in line; fewer NODES= or a shorter TIME= may start sooner"),
    ("DependencyNeverSatisfied", "the job that it depends on did not end as wanted; cancel it"),
    ("Dependency", "another job must end first"),
    ("BeginTime", "waits for its begin time; after a requeue that is about two minutes"),
    ("JobHeldUser", "you hold it; {release} lets it go on"),
    ("JobHeldAdmin", "an administrator holds it; ask the site's support"),
    (
        "launch?failed?requeued?held",
        "it could not be started and is held: a node may be broken; {release} tries again",
    ),
    ("job?requeued?in?held?state", "it is held; {release} lets it go on"),
    ("PartitionTimeLimit", f"its TIME is above the partition's limit; {RESUBMIT} a shorter TIME="),
    (
        "Partition*Node*",
        f"the partition does not give that many nodes to a job; {RESUBMIT} other NODES=",
    ),
    ("PartitionDown", "the partition is down; wait, or ask the site's support"),
    ("PartitionInactive", "the partition starts no jobs at present; wait, or ask the site"),
    ("PartitionConfig", f"the partition cannot give what it asks for; {RESUBMIT} less"),
    (
        "ReqNodeNotAvail*",
        "nodes that it needs are down, drained or reserved ({code}); wait, or submit with a "
        "shorter TIME= if a maintenance is near",
    ),
    (
        "Nodes?required?for?job?are*",
        "nodes that it needs are down, drained or kept for others; make check shows the free ones",
    ),
    ("NodeDown", "a node that it needs is down; wait, or ask the site's support"),
    ("ReservationDeleted", "its reservation was deleted; cancel it and submit it without"),
    ("Reservation", "its reservation has not begun, or is full"),
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
    ("*Max*PerJob*", f"one job may not have that much ({{code}}); {RESUBMIT} fewer NODES="),
    ("*Max*PerNode*", f"a job may not have that much of a node ({{code}}); {RESUBMIT} fewer GPUS="),
    ("QOSMin*", f"it is too small for its QOS ({{code}}); {RESUBMIT} more, or another slurm.qos"),
    (
        "*Max*PerUser*",
        "you have all that one user may have ({code}); it starts when a job of yours ends",
    ),
    ("*Max*PerAccount*", "your account has all that it may ({code}); it starts when a job ends"),
    ("AssocMax*", "you have all that you may have ({code}); it starts when a job of yours ends"),
    (
        "*Grp*RunMin*",
        "running jobs have taken all the time that may be taken at once ({code}); it starts when "
        "they have run down",
    ),
    ("AssocGrp*Minutes*", "your account's time is used up ({code}); ask who manages the account"),
    ("QOSGrp*Minutes*", "its QOS's time is used up ({code}); ask the site, or take another QOS"),
    (
        "AssocGrp*",
        "your account's jobs have all that it may have ({code}); it starts when one ends",
    ),
    ("QOSGrp*", "the jobs of its QOS have all that it may have ({code}); it starts when one ends"),
    ("*Limit", "a limit of yours is reached ({code}); it starts when a job of yours ends"),
    ("SystemFailure", "Slurm itself failed; ask the site's support"),
)


def why(code: str, job_id: int, cluster: str = "") -> str:
    """Return in plain words why a job waits; a code that we do not know stays as it is.

    `cluster`: of several the one that has it; empty: the one at hand.
    """
    shown = printable(code)
    words = ["scontrol", *([f"--clusters={cluster}"] if cluster else []), "release", str(job_id)]
    release = shlex.join(words)
    for pattern, meaning in REASONS:
        if fnmatchcase(code, pattern):
            return meaning.format(release=release, code=shown.replace("_", " "))
    return shown


def clock(moment: str, now: float | None = None) -> str:
    """Return a local time of Slurm's as one says it: 10:05, Tue 10:05, 2026-12-01 10:05.

    `now`, in seconds since the epoch, is the moment it is said at, not this one.
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
