"""All that is wrong with the content of site.toml, as far as the file alone tells."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.site import flags, variables
from cluster.site.settings import ARRIVED, EXAMPLE, FOLDERS, Site, Ssh
from runfolder.errors import did_you_mean

SECTIONS = {name: kind for name, kind in get_type_hints(Site).items() if name != "source"}
# A name of one cluster, as sbatch --clusters takes it.
CLUSTER = re.compile(r"(?!all$)[\w.-]+")
# What a string must be, beyond being one; empty ones mean a default, and are always good.
FORMS = {
    "slurm.partition": (r"[^\s,=-][^\s=]*", "the name of a partition, as sinfo shows it"),
    "slurm.cluster": (CLUSTER.pattern, "the name of one cluster"),
    "slurm.account": (r"[^\s,=-][^\s,=]*", "the name of one account"),
    "slurm.qos": (r"[^\s,=-][^\s,=]*", "the name of one QOS"),
    "slurm.gpu_type": (r"(?!gpu$)[^\s:,=()-][^\s:,=()]*", 'the type alone, such as "a100"'),
    "paths.scratch": (r"[/$].*", "an absolute path; $NAME is the node's own variable"),
    **{f"paths.{kind}": (r"[/~$].*", "an absolute path; $USER and ~ work") for kind in FOLDERS},
    "ssh.host": (r"[^\s-]\S*", "the name of a machine"),
    "ssh.user": (r"[^\s-]\S*", "the name of a user"),
    "ssh.folder": (r".*[^./~ ].*", 'a folder of its own, such as "sluice"'),
}
# The smallest and the largest number; for others, at least 0.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "slurm.cpus_per_node": (1, None),
    # sbatch --signal takes no more, and with 0 Slurm sends none.
    "slurm.save_s": (1, 65535),
    "preflight.min_free_gpu_fraction": (0, 1),
    "preflight.timeout_s": (1, None),
    "ssh.port": (0, 65535),
}
FILLED_IN = ("slurm.partition", "paths.scratch", "ssh.folder")


def faults(content: dict[str, Any]) -> Iterator[str]:
    """Find the faults, in the order of the file's sections."""
    yield from _unknown("", content, SECTIONS)
    good: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        table = content.get(section, {})
        if not isinstance(table, dict):
            yield f"'{section}' is not a table; write [{section}]"
        elif section == "environment":
            yield from variables.faults(table)
        else:
            yield from _of_section(section, kind, table, good)
    yield from _contradictions(good)


def _of_section(
    section: str, kind: Any, table: dict[str, Any], good: dict[str, Any]
) -> Iterator[str]:
    """Find the faults of a section, and add its settings without any to `good`."""
    known = {entry.name: entry for entry in fields(kind)}
    yield from _unknown(f"{section}.", table, known)
    hints = get_type_hints(kind)
    for name, entry in known.items():
        key = f"{section}.{name}"
        if name in table:
            wrong = list(_of_value(key, table[name], hints[name]))
            yield from wrong
            if not wrong:
                good[key] = table[name]
        elif entry.default is not MISSING:
            good[key] = entry.default
        elif entry.default_factory is MISSING:
            yield f"{key} is missing; {EXAMPLE} explains it"


def _unknown(prefix: str, table: dict[str, Any], known: Any) -> Iterator[str]:
    for key in table:
        if key in known:
            continue
        homes = [name for name, kind in SECTIONS.items() if key in _names(kind)]
        hint = f"; it belongs in [{homes[0]}]" if homes else did_you_mean(key, known)
        yield f"'{prefix}{key}' is not a setting{hint}"


def _names(kind: Any) -> set[str]:
    return {entry.name for entry in fields(kind)} if isinstance(kind, type) else set()


def _of_value(key: str, value: Any, kind: Any) -> Iterator[str]:
    if wanted := _wanted(key, value, kind):
        yield f"{key}: {value!r} must be {wanted}"
    elif key == "slurm.sbatch_flags":
        yield from (f"{key}: {problem}" for problem in flags.problems(value))
    # On the cluster it is not used, and a variable may be set only on the laptop.
    elif key == "ssh.config" and not os.environ.get(ARRIVED) and (name := variables.unset(value)):
        yield f"{key}: ${name} is not set in your environment"


def _wanted(key: str, value: Any, kind: Any) -> str:
    """Return what a value must be, if it is not; else ""."""
    if get_origin(kind) is Literal:
        choices = " or ".join(f'"{choice}"' for choice in get_args(kind))
        return "" if value in get_args(kind) else choices
    if get_origin(kind) is list:
        good = isinstance(value, list) and all(map(_is_line, value))
        return "" if good else 'a list of strings, such as ["one", "two"]'
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is str:
        if not _is_line(value):
            return "a string in quotes, of one line"
        if not value:
            return "filled in" if key in FILLED_IN else ""
        form, wanted = FORMS.get(key, (".*", ""))
        return "" if re.fullmatch(form, value) else wanted
    least, most = BOUNDS.get(key, (0, None))
    numbers = (int, float) if kind is float else int
    is_number = isinstance(value, numbers) and not isinstance(value, bool)
    good = is_number and value >= least and (most is None or value <= most)
    limit = f", at least {least}" if most is None else f" from {least} to {most}"
    return "" if good else f"a {'' if kind is float else 'whole '}number{limit}"


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f]", value)


def _contradictions(good: dict[str, Any]) -> Iterator[str]:
    """Find settings that cannot all be meant, among those that are right by themselves."""
    cpus, gpus = good.get("slurm.cpus_per_node"), good.get("slurm.gpus_per_node")
    if cpus is not None and gpus is not None and cpus < gpus:
        yield (
            f"slurm.cpus_per_node: {cpus} is less than slurm.gpus_per_node = {gpus}; each GPU's "
            "process needs a CPU"
        )
    if gpus == 0 and (kind := good.get("slurm.gpu_type")):
        yield (
            f"slurm.gpu_type: '{kind}' contradicts slurm.gpus_per_node = 0; leave it out, or give "
            "the number of GPUs"
        )
    given = dict(flags.options(good.get("slurm.sbatch_flags", [])))
    for name in ("partition", "account", "qos"):
        own = good.get(f"slurm.{name}")
        if own and name in given and given[name] != own:
            yield (
                f"slurm.sbatch_flags: --{name}={given[name]} contradicts slurm.{name} = "
                f'"{own}"; leave one of them out'
            )
    memory = good.get("slurm.memory_per_node_mb")
    for name in ("mem", "mem-per-cpu", "mem-per-gpu"):
        if memory and name in given:
            yield (
                f"slurm.sbatch_flags: --{name}={given[name]} contradicts "
                f"slurm.memory_per_node_mb = {memory}; leave one of them out"
            )
    if good.get("ssh.host") == "":
        for name, default in vars(Ssh()).items():
            if good.get(f"ssh.{name}", default) != default:
                yield f"ssh.{name}: has no effect without ssh.host; set it, or leave both out"
