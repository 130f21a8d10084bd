"""The sbatch options that a site adds, parsed as sbatch parses them, and those that are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

# The names of short options, and the long options that take no value or an optional one: all others
# take the next word as their value (man sbatch).
SHORT = {"A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint"}
SHORT |= {"c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile"}
SHORT |= {"G": "gpus", "H": "hold", "h": "help", "I": "immediate", "i": "input", "J": "job-name"}
SHORT |= {"k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes"}
SHORT |= {"n": "ntasks", "O": "overcommit", "o": "output", "p": "partition", "Q": "quiet"}
SHORT |= {"q": "qos", "S": "core-spec", "s": "oversubscribe", "t": "time", "u": "usage"}
SHORT |= {"V": "version", "v": "verbose", "W": "wait", "w": "nodelist", "x": "exclude"}
ALONE = {"contiguous", "exclusive", "get-user-env", "help", "hold", "ignore-pbs", "immediate"}
ALONE |= {"nice", "no-kill", "no-requeue", "overcommit", "oversubscribe", "parsable", "propagate"}
ALONE |= {"quiet", "reboot", "requeue", "share", "spread-job", "stepmgr", "test-only", "usage"}
ALONE |= {"use-min-nodes", "verbose", "version", "wait", "x11"}
# The others, so that an abbreviated name can be told from a full one.
LONG = {*SHORT.values(), *ALONE}
LONG |= {"bb", "bbf", "cluster-constraint", "comment", "cores-per-socket", "cpu-freq", "deadline"}
LONG |= {"delay-boot", "extra", "gid", "gpu-bind", "gpu-freq", "gres", "gres-flags", "hint"}
LONG |= {"kill-on-invalid-dep", "mail-type", "mail-user", "mcs-label", "mem", "mem-bind"}
LONG |= {"mem-per-cpu", "mem-per-gpu", "mincpus", "network", "power", "prefer", "priority"}
LONG |= {"profile", "reservation", "segment", "sockets-per-node", "switches"}
LONG |= {"thread-spec", "threads-per-core", "time-min", "tmp", "tres-bind", "tres-per-task"}
LONG |= {"uid", "wait-all-nodes", "wckey"}

_SIZES = "sizes come from NODES=, GPUS=, NPROC= and the per-node settings in [slurm]"
_LOG = "make logs reads a job's output from the run's folder"
_OWN_SCRIPT = "the batch script is Sluice's own"
_ANSWER = "make submit reads sbatch's output, and then returns"
_REQUEUE = "a job requeues itself after it has saved"
# Options that Sluice sets itself: setting them again would break what relies on them.
REFUSED: Mapping[str, str] = {
    "array": "a run is one job; submit it several times",
    "wrap": _OWN_SCRIPT,
    "container": _OWN_SCRIPT + "; it starts the container itself",
    "container-id": _OWN_SCRIPT + "; it starts the container itself",
    "input": _OWN_SCRIPT,
    "parsable": _ANSWER,
    "test-only": _ANSWER + "; PLAN=1 queues nothing",
    "quiet": _ANSWER,
    "wait": _ANSWER + "; make logs follows the run",
    "help": _ANSWER,
    "usage": _ANSWER,
    "version": _ANSWER,
    "output": _LOG,
    "error": _LOG,
    "open-mode": _LOG,
    "job-name": "NAME= names a run",
    "chdir": "a job runs in its run's folder",
    "export": "variables of the training processes belong in [environment]",
    "export-file": "variables of the training processes belong in [environment]",
    "get-user-env": "variables of the training processes belong in [environment]",
    "requeue": _REQUEUE,
    "no-requeue": _REQUEUE,
    "no-kill": "a job that has lost a node continues in its next attempt, from its checkpoint",
    "signal": "slurm.save_s sets when a job saves",
    "time": "TIME=, or the job's file, sets the time limit",
    "clusters": "set slurm.cluster",
    "nodes": _SIZES,
    "ntasks": _SIZES,
    "ntasks-per-node": _SIZES,
    "tasks-per-node": _SIZES,
    "ntasks-per-core": _SIZES,
    "ntasks-per-socket": _SIZES,
    "ntasks-per-gpu": _SIZES,
    "cpus-per-task": _SIZES,
    "cpus-per-gpu": _SIZES,
    "gpus": _SIZES,
    "gpus-per-node": _SIZES,
    "gpus-per-task": _SIZES,
    "gpus-per-socket": _SIZES,
    "ntasks-per-tres": _SIZES,
}
# Variables that set the same for sbatch; only two are passed on (cluster/commands/plan.py).
PASSED_VARIABLES = ("SBATCH_ACCOUNT", "SBATCH_RESERVATION")
CLUSTER_VARIABLES = ("SBATCH_CLUSTERS", "SLURM_CLUSTERS")


def options(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Return name and value of each option, as sbatch would parse these words.

    An abbreviated name is written out if it means one that is refused here. A word that belongs to
    no option has the name "": sbatch would take it as the batch script, and ":" as another job.
    """
    words = iter(flags)
    for word in words:
        name, equals, value = word[2:].partition("=")
        # "--mem 5G" is one word to sbatch, which knows no such option.
        if word.startswith("--") and re.fullmatch(r"\S+", name):
            name = _whole(name)
            yield name, value if equals or name in ALONE else next(words, "")
        elif re.match(r"-[^-]", word):
            yield from _short(word[1:], words)
        else:
            yield "", word


def _short(letters: str, words: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Return the options of a word such as -Hp; the last may be followed by its value."""
    for place, letter in enumerate(letters):
        name = SHORT.get(letter, letter)
        if name not in ALONE:
            rest = letters[place + 1 :]
            # sbatch takes -p=gpu as a partition named "=gpu", which nobody wants.
            yield name, rest.removeprefix("=") or next(words, "")
            return
        yield name, ""


def _whole(name: str) -> str:
    if not name or name in LONG or name in REFUSED:
        return name
    meant = sorted(full for full in {*LONG, *REFUSED} if full.startswith(name))
    # sbatch refuses an ambiguous name, too: then the reason for a refused one is given.
    return next((full for full in meant if full in REFUSED), meant[0] if len(meant) == 1 else name)


def problems(flags: Sequence[str]) -> Iterator[str]:
    """Find which of these flags are not allowed, and why."""
    for name, value in options(flags):
        # Slurm's other names for CPUs and GPUs: gpu:2, gres:gpu:a100:2, gres/gpu=2, cpu=4.
        counts = name == "gres" or name.startswith("tres-per-")
        if not name:
            yield f"'{value}' is not an sbatch option; write each with its value: --NAME=VALUE"
        elif name in REFUSED:
            yield f"--{name} is not allowed here: {REFUSED[name]}"
        elif counts and re.search(r"(?i)(^|,)\s*(gres[:/])?(cpu|gpu)\b", value):
            yield f"--{name}={value} is not allowed here: {_SIZES}, such as slurm.gpu_type"


def ignored(environment: Mapping[str, str]) -> list[str]:
    """Return the variables in this environment that sbatch would read, but does not get."""
    passed = {*PASSED_VARIABLES, *CLUSTER_VARIABLES}
    told = (name for name in environment if re.fullmatch(r"SBATCH_\w+", name))
    return sorted(name for name in told if name not in passed)
