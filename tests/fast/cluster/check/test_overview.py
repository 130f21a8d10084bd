"""overview.py and what it reads: three releases, and answers that no Slurm should give."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.check import limits, login_node, overview, room, table, verdict
from cluster.check.choice import Choice
from cluster.check.finding import Verdict
from cluster.plan.request import Request
from cluster.site.settings import PRIVATE
from cluster.slurm.refusals import SlurmError
from tests.fast.cluster import answers
from tests.fast.cluster.answers import RELEASES, Recorded

QUIET = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
REQUEST = Request(
    num_nodes=1,
    gpus_per_node=1,
    processes_per_node=1,
    time="10",
    cpus_per_node=2,
    memory_per_node_mb=0,
    device="cpu",
)


@pytest.fixture(autouse=True)
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "user_name", lambda: answers.USER)
    # This machine has nothing to do with it.
    monkeypatch.setattr(login_node, "facts", lambda unknown: HERE)


HERE: dict[str, Any] = {
    "space": [{"folder": "home", "path": "/h", "mount": "/", "bytes": 2**40, "free_bytes": 2**30}],
    "quotas": None,
    "modules": None,
    "apptainer": None,
    "user_namespaces": None,
}


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_tells_the_same(release: str) -> None:
    facts = overview.facts(Recorded(answers=answers.of(release)))
    assert facts["slurm_version"].startswith(release)
    assert facts["unknown"] == {}
    gpu, short, down = facts["partitions"]
    assert (gpu["name"], gpu["free_cpus"], gpu["total_cpus"]) == ("gpu", 6, 8)
    assert gpu["gpus"] == [{"type": None, "free": 3, "total": 4}]
    assert (short["max_nodes"], short["denied_accounts"]) == (1, ["closed"])
    assert down["state"] == "DOWN"
    assert [node["free_cpus"] for node in facts["nodes"]] == [2, 4]
    (kept,) = facts["reservations"]
    assert (kept["name"], kept["nodes"], kept["users"]) == ("upgrade", "node2", ["root"])
    (mine,) = facts["associations"]
    assert mine["qos"] == ["normal", "short", "urgent"]
    used = {(one["name"], one["of"]): (one["limit"], one["used"]) for one in mine["limits"]}
    assert used == {
        ("MaxJobs", None): (7, 1),
        ("MaxSubmitJobs", None): (8, 3),
        ("MaxTRESPJ", "node"): (2, None),
        ("MaxWallPJ", None): (600, None),
    }
    above = {(one["name"], one["of"]): one["used"] for one in mine["limits_above"]}
    assert above[("GrpTRES", "gres/gpu")] == 1
    assert above[("GrpSubmitJobs", None)] == 3
    (normal,) = [qos for qos in facts["qos"] if qos["name"] == "normal"]
    used = {(one["name"], one["of"]): (one["limit"], one["used"]) for one in normal["limits"]}
    assert used[("MaxTRESPU", "gres/gpu")] == (3, 1)
    assert used[("MaxJobsPU", None)] == (4, 1)
    assert used[("GrpTRES", "node")] == (2, 1)
    assert [job["name"] for job in facts["jobs"]] == ["second", "held", "a|b"]
    assert facts["jobs"][1]["why"] == "you put it on hold; scontrol release 3 releases it"
    assert facts["fair_share"][0]["fair_share"] == 1.0


SILENT = {
    "scontrol --oneliner --detail show node": "nodes",
    "sshare": "fair_share",
    "squeue --noheader --me": "jobs",
    "scontrol --oneliner show reservation": "reservations",
}


@pytest.mark.parametrize("begin", SILENT)
def test_what_is_refused_is_unknown(begin: str) -> None:
    def change(command: str, said: str) -> str:
        if command.startswith(begin):
            raise SlurmError("Access/permission denied \033[31m")
        return said

    facts = overview.facts(Recorded(answers=answers.of("22.05"), change=change))
    assert facts[SILENT[begin]] is None
    assert "denied ?[31m" in facts["unknown"][SILENT[begin]]


@pytest.mark.parametrize("fails", [True, False])
def test_hidden_accounting_is_unknown_and_never_without_limits(
    fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(command: str, said: str) -> str:
        if not re.match("sacctmgr|scontrol --oneliner show assoc_mgr", command):
            return said
        if fails:
            raise SlurmError("Access/permission denied")
        return ""

    queue = Recorded(answers=answers.of("24.11"), change=change)
    facts = overview.facts(queue)
    assert (facts["associations"], facts["qos"]) == (None, None)
    assert any("all limits" in what for what in facts["unknown"])
    table.show(facts)
    said = capsys.readouterr().out
    assert re.search(r"accounts of ada\n +unknown\n", said)
    assert re.search(r"limits and their use\n +unknown\n", said)
    remarks = limits.judge(limits.read(queue), Choice.from_site(PRIVATE), REQUEST).remarks
    assert any(remark.startswith("unknown: accounts of ada") for remark in remarks)


def test_a_limit_that_cannot_be_read_is_unknown() -> None:
    def change(command: str, said: str) -> str:
        if command.startswith("sacctmgr"):
            return said.replace("10:00:00", "ten hours").replace("gres/gpu=3", "gres/gpu=some")
        if command.endswith("show partition"):
            return said.replace("MaxTime=1-00:00:00", "MaxTime=a day")
        return said

    facts = overview.facts(Recorded(answers=answers.of("22.05"), change=change))
    whose = set(facts["unknown"])
    assert {"MaxWallPJ of account research", "MaxTRESPU of QOS normal"} <= whose
    assert "MaxTime of partition gpu" in whose
    assert facts["partitions"][0]["max_time"] == "unknown"


def test_an_answer_that_breaks_off_is_unknown() -> None:
    said = answers.of("22.05")

    def facts(begin: str, end: str) -> dict[str, Any]:
        (command,) = [command for command in said if re.match(begin, command)]
        cut = said[command][: said[command].index(end) + len(end)]
        return overview.facts(Recorded(answers=said | {command: cut}))

    assert "user" in facts(r"sacctmgr .* show user", "node=2|||7")["unknown"]
    assert "qos" in facts(r"sacctmgr .* show qos", "OverPartQOS|||||node=2")["unknown"]
    # In the use of a QOS by a user: it is not nothing.
    shown = facts(r"scontrol .* show assoc_mgr", "MaxTRESPU=cpu=N(2),mem")
    (normal,) = [qos for qos in shown["qos"] if qos["name"] == "normal"]
    assert {one["used"] for one in normal["limits"] if one["name"].endswith("PU")} == {None}


# ---- hostile answers ------------------------------------------------------------------------


def test_no_name_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    escape = "\033]0;x\007\033[2J"

    def change(command: str, said: str) -> str:
        for name in ("second", "held", "upgrade", "research", "urgent", "gpu ", "MAINT", "short"):
            said = said.replace(name, name[:2] + escape + name[2:])
        if command.endswith("show node"):
            said = said.replace("\n", f" Reason=hot {escape}\n")
        return said

    facts = overview.facts(Recorded(answers=answers.of("22.05"), change=change))
    shown = json.dumps(facts, ensure_ascii=False)
    assert shown.count("]0;x??[2J") > 10
    assert shown.isprintable()
    table.show(facts)
    assert "\033" not in capsys.readouterr().out


ESCAPES = ["\033[2J", "\033]0;x\007", "\x9b31m", "\r", "\u202e", "\0", "|", "=", "(", "{", "\n"]
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 40),
        st.one_of(st.sampled_from(ESCAPES), st.text(max_size=6), st.just("999999999999999999999")),
    ),
    max_size=12,
)


@QUIET
@given(st.sampled_from(RELEASES), EDITS, st.data())
def test_whatever_slurm_says_nothing_breaks_and_nothing_steers_the_terminal(
    release: str, edits: list[tuple[float, int, str]], data: st.DataObject
) -> None:
    said = answers.of(release)
    target = data.draw(st.sampled_from(sorted(said)))
    text = said[target]
    for where, length, new in edits:
        at = int(where * len(text))
        text = text[:at] + new + text[at + length :]
    queue = Recorded(answers=said | {target: text})
    facts = overview.facts(queue)
    shown = json.dumps(facts, ensure_ascii=False)
    assert not [letter for letter in shown if not letter.isprintable()]
    table.show(facts)
    answer = verdict.on(queue, PRIVATE, REQUEST, "tinyllama")
    assert answer.verdict in tuple(Verdict)
    said_of_it = json.dumps(answer.facts(), ensure_ascii=False)
    assert not [letter for letter in said_of_it if not letter.isprintable()]


@QUIET
@given(st.sampled_from(RELEASES), st.data())
def test_whatever_is_missing_is_said_and_no_limit_is_made_wider(
    release: str, data: st.DataObject
) -> None:
    """Cut anywhere, a limit is as it was, or it is said that something is unknown."""
    said = answers.of(release)
    target = data.draw(st.sampled_from([name for name in sorted(said) if _limits_jobs(name)]))
    cut = data.draw(st.integers(0, len(said[target])))
    whole = _bounds(overview.facts(Recorded(answers=said)))
    facts = overview.facts(Recorded(answers=said | {target: said[target][:cut]}))
    if facts["unknown"]:
        return
    for whose, bounds in _bounds(facts).items():
        # How much is in use may be unknown, but not less.
        assert {key: limit for key, (limit, _) in bounds.items()} == {
            key: limit for key, (limit, _) in whole[whose].items()
        }
        assert all(used in (None, whole[whose][key][1]) for key, (_, used) in bounds.items())


def _limits_jobs(command: str) -> bool:
    return bool(re.match("sacctmgr|scontrol --oneliner show (assoc_mgr|partition)", command))


def _bounds(facts: dict[str, Any]) -> dict[str, dict[tuple[str, str], tuple[Any, Any]]]:
    """Return the limits of each holder and partition that is shown, with their use."""
    found: dict[str, dict[tuple[str, str], tuple[Any, Any]]] = {}
    for one in facts["associations"] or []:
        limits_of_it = [*one["limits"], *(one["limits_above"] or [])]
        found[f"account {one['account']}"] = _by_name(limits_of_it)
    for one in facts["qos"] or []:
        found[f"QOS {one['name']}"] = _by_name(one["limits"])
    for one in facts["partitions"]:
        keys = ("state", "max_time", "max_nodes", "denied_accounts", "total_nodes")
        found[one["name"]] = {(key, ""): (str(one[key]), None) for key in keys}
    return found


def _by_name(limits_of_it: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[Any, Any]]:
    return {
        (f"{one['whose']} {one['name']}", str(one["of"])): (one["limit"], one["used"])
        for one in limits_of_it
    }


# ---- this machine, and lists ----------------------------------------------------------------


def test_quotas_of_quota_and_of_lfs() -> None:
    quota = """Disk quotas for user ada (uid 1001):
     Filesystem   space   quota   limit   grace   files   quota   limit   grace
server:/home  1048576* 1000000 2000000 1700000000   12     0       0       0
"""
    (home,) = login_node.quota_lines(quota)
    assert home["file_system"] == "server:/home"
    assert (home["used_bytes"], home["hard_limit_bytes"]) == (2**30, 2_000_000 * 1024)
    lfs = "     /scratch 2048       0       0       -      77       0  0       -\n"
    (scratch,) = login_node.quota_lines(lfs)
    assert (scratch["used_bytes"], scratch["hard_limit_bytes"]) == (2048 * 1024, None)
    assert scratch["used_files"] == 77


@given(st.text(max_size=200))
def test_quotas_of_anything(said: str) -> None:
    list(login_node.quota_lines(said))


def test_who_waits_is_read_without_names() -> None:
    queue = Recorded(answers=answers.of("26.05"))
    (second, held) = room.waiting(queue, "gpu")
    assert (second.job_id, second.nodes) == ("2", ("node1", "node2"))
    assert (held.reason, held.start) == ("JobHeldUser", "N/A")
