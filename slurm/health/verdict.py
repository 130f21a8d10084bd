"""What the reports of all nodes say together: is the allocation healthy, and who is to blame?"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder import attempts
from runfolder.decision import ALL_NODES_ALIKE, GUILTY_NODES, SUSPECT_NODES
from runfolder.files import write_json

# Problems of a node itself. A single node cannot be compared with others, and only these are its
# own fault; a data set that is missing there would be missing on the next one, too.
OF_THE_NODE = ("scratch", "memory", "gpus", "all-reduce", "bandwidth")
# Checks in which a node waits for the others: if it hangs there, it may be their fault.
WITH_OTHERS = (
    "rendezvous",
    "clock",
    "connections",
    "shared run folder",
    "all-reduce",
    "bandwidth",
)

# What is found here, not by the node's own check.
OF_THE_JUDGE = ("report", "end", "answer")


@dataclass(frozen=True)
class Finding:
    """Something wrong at a node."""

    node: str
    # The name of the check that failed.
    check: str
    problem: str
    guilty: bool
    # Whether all nodes have it, each on its own: then it is the job's fault, or the site's.
    is_common: bool = False


def judge(environment: Mapping[str, str]) -> int:
    """Read the nodes' reports, print and write the verdict, and return the exit code.

    Raises:
        ValueError: a variable is missing or wrong.
    """
    try:
        run, number = Path(environment["SLUICE_RUN_FOLDER"]), int(environment["SLUICE_ATTEMPT"])
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is not set; the batch script resolves it") from None
    names = attempts.read(run, number).nodes
    num_nodes = len(names)
    if not names:
        raise ValueError(f"{attempts.folder_of(run, number)}: its slurm.json lists no nodes")
    folder = attempts.preflight_folder(run, number)
    reports = [read_report(folder / f"node-{rank}.json") for rank in range(num_nodes)]
    findings = find(names, reports)
    guilty = [name for name in names if any(f.guilty and f.node == name for f in findings)]
    with_findings = [name for name in names if any(f.node == name for f in findings)]
    suspects = [] if guilty or any(f.is_common for f in findings) else with_findings
    problems = _lines(findings, num_nodes)
    folder.mkdir(parents=True, exist_ok=True)
    verdict = {
        "healthy": not findings,
        "guilty": guilty,
        "suspects": suspects,
        "problems": problems,
    }
    write_json(folder / "verdict.json", verdict)

    if not findings:
        print(f"preflight: {_summary([report for report in reports if report])}")
        return 0
    for problem in problems:
        print(f"preflight: {problem}")
    if guilty:
        return GUILTY_NODES
    return SUSPECT_NODES if suspects else ALL_NODES_ALIKE


def read_report(file: Path) -> dict[str, Any] | str | None:
    """Return a node's report; a sentence if it is damaged, None if there is none."""
    try:
        report = json.loads(file.read_text())
        for key in ("checks", "done", "during", "missing", "elsewhere", "seconds"):
            report[key]
        for each in report["checks"]:
            (each["name"], each["ok"], each["problem"], each["guilty"])
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{file.name} is damaged"
    assert isinstance(report, dict)
    return report


def find(names: list[str], reports: list[dict[str, Any] | str | None]) -> list[Finding]:
    """Return all that is wrong, by node, with who is to blame for it.

    Args:
        names: of the nodes, by rank.
        reports: what `read_report` returned for each.
    """
    read = {rank: report for rank, report in enumerate(reports) if isinstance(report, dict)}
    missing = {rank for report in read.values() for rank in report["missing"]}
    elsewhere = {rank for report in read.values() for rank in report["elsewhere"]}
    # If the rendezvous got this far, nodes whose files do not appear here did answer.
    met = any(each["name"] == "shared run folder" for r in read.values() for each in r["checks"])
    unfinished = [rank for rank in range(len(names)) if rank not in read or not read[rank]["done"]]
    findings: list[Finding] = []
    for rank, (name, report) in enumerate(zip(names, reports, strict=True)):
        if isinstance(report, dict):
            findings += [
                Finding(name, each["name"], each["problem"], each["guilty"])
                for each in report["checks"]
                if not each["ok"]
            ]
            during = report["during"]
            if not report["done"] and all(each["name"] != during for each in report["checks"]):
                guilty = during not in WITH_OTHERS or rank in missing or len(unfinished) == 1
                findings.append(Finding(name, "end", f"{during}: ended during this check", guilty))
            if rank in missing and report["done"] and len(missing) < len(names) / 2:
                text = "did not answer the head node in time, while most others did"
                findings.append(Finding(name, "answer", text, guilty=True))
        elif report is not None:
            findings.append(Finding(name, "report", report, guilty=True))
        elif met and rank not in missing:
            text = "answered, but its report is missing from the run folder on the head node"
            findings.append(Finding(name, "report", text, guilty=rank in elsewhere))
        else:
            text = "did not start: it wrote nothing to the run folder"
            findings.append(Finding(name, "report", text, guilty=True))
    return _without_common_faults(findings, len(names), len(read))


def _without_common_faults(findings: list[Finding], num_nodes: int, num_read: int) -> list[Finding]:
    """Blame no node for what is the same on all: that is the job's fault or the site's."""
    blamed = Counter(check for check, _ in {(f.check, f.node) for f in findings if f.guilty})

    def common(finding: Finding) -> bool:
        if num_nodes == 1:
            return finding.check not in OF_THE_NODE
        # A node without a report cannot contradict what the others report.
        compared = finding.check in (*WITH_OTHERS, *OF_THE_JUDGE)
        all_of_them = num_nodes if compared else num_read
        return blamed[finding.check] >= all_of_them

    return [
        Finding(
            f.node,
            f.check,
            f.problem,
            guilty=f.guilty and not common(f),
            # A problem between nodes, or a missing report, may differ on other nodes.
            is_common=common(f) and f.check not in (*WITH_OTHERS, *OF_THE_JUDGE),
        )
        for f in findings
    ]


def _lines(findings: list[Finding], num_nodes: int) -> list[str]:
    """Return a line for each problem, with all the nodes that have it."""
    nodes: dict[str, list[str]] = {}
    for finding in findings:
        nodes.setdefault(finding.problem, []).append(finding.node)
    return [
        f"{f'all {num_nodes} nodes' if len(has) == num_nodes > 1 else ', '.join(has)}: {problem}"
        for problem, has in nodes.items()
    ]


def _summary(reports: list[Any]) -> str:
    """Return the summary of a healthy allocation."""
    number = len(reports)
    seconds = max(report["seconds"] for report in reports)
    text = f"{number} node{'s' if number > 1 else ''} healthy in {seconds:.1f} s"
    bandwidth = reports[0].get("bandwidth_bytes_per_second")
    return text + (f", all-reduce {bandwidth / 1e9:.2f} GB/s" if bandwidth else "")


# ---- what only all nodes together show -------------------------------------------------------


def skewed_clocks(clocks: list[float], allowed_s: float) -> dict[int, float]:
    """Return, by rank, how many seconds a clock is off the median, for those too far off.

    Two clocks have no useful median: both are returned if they differ.
    """
    if len(clocks) == 2:
        difference = clocks[0] - clocks[1]
        return {0: difference, 1: -difference} if abs(difference) > allowed_s else {}
    middle = statistics.median(clocks)
    return {
        rank: clock - middle for rank, clock in enumerate(clocks) if abs(clock - middle) > allowed_s
    }


def largest_group(views: list[list[int]]) -> set[int]:
    """Return the largest group of ranks that all see each other; among equals, the head's.

    Args:
        views: by rank, the ranks of which it sees the files.
    """
    groups = [
        {other for other in view if rank in views[other] and set(view) == set(views[other])}
        for rank, view in enumerate(views)
    ]
    return max(groups, key=len)
