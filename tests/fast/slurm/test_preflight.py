"""slurm/preflight.py: real processes as nodes of this machine, and the judgements on their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from runfolder import attempts, launch
from slurm import preflight
from slurm.health.reach import cut_off, listen, unreachable, wait_until_reachable
from slurm.health.report import Report, Unhealthy
from slurm.health.settings import OF_THE_NODE, Settings
from slurm.health.verdict import Finding, find, largest_group, read_report, skewed_clocks
from slurm.preflight import memory_limit
from tests import waiting
from tests.fast.slurm import node
from tests.shared import CHECKOUT, free_port
from tests.waiting import HANGS_AFTER_S

# However long a busy machine takes, the nodes wait for one another.
PATIENT = {"ANSWER_S": HANGS_AFTER_S, "FILES_APPEAR_S": HANGS_AFTER_S}


class Allocation:
    """A run folder, and nodes that are processes of this machine."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.run_folder, self.num_nodes = folder / "run", num_nodes
        self.results = self.run_folder / "attempts/1/preflight"
        (folder / "datasets/text").mkdir(parents=True)
        self.run_folder.mkdir()
        staged = "staged: {train: text, tokenizer: text, model: null}\n"
        (self.run_folder / "config.yaml").write_text(staged)
        ours = {name: value for name, value in os.environ.items() if "SLUICE_" not in name}
        self.values = {
            "num_nodes": str(num_nodes),
            "gpus_per_node": "0",
            "floor_bytes_per_second": "0",
            # Each tells its time when it comes to it, on a busy machine some seconds apart.
            "max_clock_skew_s": str(HANGS_AFTER_S),
            "min_free_memory_bytes": "1000000",
            "min_free_gpu_fraction": "0.9",
            "min_free_scratch_bytes": "1000000",
            # The others wait for a share of it, and some more.
            "preflight_timeout_s": str(3 * HANGS_AFTER_S),
        }
        launch.write(self.run_folder, self.values, {})
        attempts.begin(self.run_folder, {"nodes": [self.name(rank) for rank in range(num_nodes)]})
        self.environment = ours | {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "SLUICE_RUN_FOLDER": str(self.run_folder),
            "SLUICE_ATTEMPT": "1",
            "SLUICE_DATASETS": str(folder / "datasets"),
            "SLUICE_SCRATCH": str(folder),
            "SLUICE_DEVICE": "cpu",
        }
        self.nodes: dict[int, Any] = {}

    @staticmethod
    def name(rank: int) -> str:
        return f"node{rank + 1}"

    def environment_of(self, rank: int, **different: Any) -> dict[str, str]:
        """Return what a node is given; `different`: of these, or of the run's launch.env."""
        own = {"SLUICE_NODE_RANK": str(rank), "SLURMD_NODENAME": self.name(rank)}
        words = {name: str(value) for name, value in different.items()}
        own |= {OF_THE_NODE[name]: words.pop(name) for name in different if name in OF_THE_NODE}
        if words:
            # The same folder, in which this node alone reads another launch.env.
            view = self.folder / f"run-{rank}"
            view.mkdir()
            for name in ("attempts", "config.yaml"):
                (view / name).symlink_to(self.run_folder / name)
            launch.write(view, self.values | words, {})
            own["SLUICE_RUN_FOLDER"] = str(view)
        return self.environment | own

    def start(self, rank: int, limits: dict[str, float] = PATIENT, **different: Any) -> None:
        environment = self.environment_of(rank, **different)
        process = node.context().Process(
            target=node.check, args=(environment, self.output(rank), limits), daemon=True
        )
        process.start()
        self.nodes[rank] = process

    def output(self, rank: int) -> Path:
        return self.folder / f"output-{rank}"

    def codes(self) -> list[int]:
        """Wait for the nodes, which say nothing, and return their exit codes by rank."""
        for rank, process in sorted(self.nodes.items()):
            process.join(HANGS_AFTER_S)
            assert self.output(rank).read_text() == ""
        return [process.exitcode for _, process in sorted(self.nodes.items())]

    def judge(self, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
        """Return the exit code of the judge and its lines; its verdict must say the same."""
        with mock.patch.dict(os.environ, self.environment, clear=True):
            code = preflight.main(["judge"])
        said = capfd.readouterr()
        assert said.err == ""
        lines = [line.removeprefix("preflight: ") for line in said.out.splitlines()]
        verdict = json.loads((self.results / "verdict.json").read_text())
        assert verdict["healthy"] == (code == 0)
        assert verdict["problems"] == ([] if verdict["healthy"] else lines)
        assert bool(verdict["guilty"]) == (code == 3)
        return code, lines

    def guilty(self) -> list[str]:
        verdict = json.loads((self.results / "verdict.json").read_text())
        guilty: list[str] = verdict["guilty"]
        return guilty

    def suspects(self) -> list[str]:
        verdict = json.loads((self.results / "verdict.json").read_text())
        suspects: list[str] = verdict["suspects"]
        return suspects

    def report(self, rank: int) -> dict[str, Any]:
        report = read_report(self.results / f"node-{rank}.json")
        assert isinstance(report, dict)
        return report


@pytest.fixture(scope="module", autouse=True)
def quiet_torch() -> Iterator[None]:
    """Let torch not warn of connections that end: preflight.py asks for that before it imports."""
    with mock.patch.dict(os.environ, {"TORCH_CPP_LOG_LEVEL": "ERROR"}):
        yield


# ---- real nodes -----------------------------------------------------------------------------

LOCAL = ["run folder", "code", "datasets", "scratch", "memory"]


def test_a_healthy_node_is_found_healthy_by_the_commands_of_the_batch_script(
    tmp_path: Path,
) -> None:
    allocation = Allocation(tmp_path, 1)

    def command(word: str) -> tuple[int, str, str]:
        words = [sys.executable, "-m", "slurm.preflight", word]
        done = waiting.run(words, cwd=CHECKOUT, env=allocation.environment_of(0))
        return done.returncode, done.stdout, done.stderr

    assert command("check") == (0, "", "")
    code, out, err = command("judge")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"preflight: 1 node healthy in \d+\.\d s\n", out)
    assert [each["name"] for each in allocation.report(0)["checks"]] == LOCAL


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_healthy_nodes_are_found_healthy(
    tmp_path: Path, num_nodes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    allocation = Allocation(tmp_path, num_nodes)
    for rank in range(num_nodes):
        allocation.start(rank)
    assert allocation.codes() == [0] * num_nodes
    code, [line] = allocation.judge(capfd)
    assert code == 0
    assert line.startswith(f"{num_nodes} nodes healthy in ")
    assert "GB/s" in line
    names = [each["name"] for each in allocation.report(0)["checks"]]
    network = ["interface", "rendezvous", "clock", "connections", "shared run folder"]
    assert names == [*LOCAL, *network, "all-reduce", "bandwidth"]


def test_what_is_wrong_on_one_node_is_its_fault_and_the_rest_is_still_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    allocation = Allocation(tmp_path, 2)
    allocation.start(0)
    allocation.start(1, min_free_scratch_bytes=1e18, datasets=tmp_path / "nowhere")
    assert allocation.codes() == [0, 1]
    code, lines = allocation.judge(capfd)
    assert (code, allocation.guilty()) == (3, ["node2"])
    assert lines[0] == f"node2: datasets {tmp_path}/nowhere: is missing"
    assert lines[1].startswith(f"node2: scratch {tmp_path}: ")
    assert lines[1].endswith(" GB free, 1000000000.0 GB required")
    assert len(lines) == 2
    assert allocation.report(0)["bandwidth_bytes_per_second"] > 0


@pytest.mark.parametrize("data", ["missing", "there"])
def test_what_is_wrong_between_two_nodes_makes_both_suspects_and_what_all_lack_neither(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    allocation = Allocation(tmp_path, 2)
    if data == "missing":
        (tmp_path / "datasets/text").rmdir()
    # A floor that nothing reaches: between two nodes it cannot be told whose fault that is.
    limits = PATIENT | {"MAX_LINK_BYTES": 2**20}
    for rank in range(2):
        allocation.start(rank, limits, floor_bytes_per_second=1e13)
    assert allocation.codes() == [1, 1]
    code, lines = allocation.judge(capfd)
    assert allocation.guilty() == []
    assert lines[-1].startswith("all 2 nodes: all-reduce ")
    assert "GB/s, at least 10000.00 GB/s required; slow links: node1-node2 " in lines[-1]
    if data == "there":
        assert (code, len(lines), allocation.suspects()) == (5, 1, ["node1", "node2"])
    else:
        assert (code, len(lines), allocation.suspects()) == (1, 2, [])
        assert lines[0] == f"all 2 nodes: datasets {tmp_path}/datasets/text: is missing"


def test_where_no_node_said_anything_all_are_suspects(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    allocation = Allocation(tmp_path, 2)
    code, lines = allocation.judge(capfd)
    assert lines == ["all 2 nodes: did not start: it wrote nothing to the run folder"]
    assert (code, allocation.guilty(), allocation.suspects()) == (5, [], ["node1", "node2"])


def test_a_node_that_hangs_and_one_that_never_starts_are_guilty(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    allocation = Allocation(tmp_path, 3)
    hanging = tmp_path / "hanging"
    hanging.mkdir()
    # Nobody writes into it, so that opening it waits for ever, as a dead file server does.
    os.mkfifo(hanging / "text")
    # It waits a second for the others.
    allocation.start(0, limits=PATIENT | {"RENDEZVOUS_SHARE": 0.0})
    allocation.start(1, preflight_timeout_s=1, datasets=hanging)
    assert allocation.codes() == [1, 1]
    assert allocation.report(0)["missing"] == [1, 2]
    assert [report["done"] for report in map(allocation.report, range(2))] == [True, False]
    code, lines = allocation.judge(capfd)
    assert (code, allocation.guilty()) == (3, ["node2", "node3"])
    assert lines[0].startswith("node1: rendezvous: 2 of 3 nodes did not answer within ")
    # On a busy machine the second may be over before it comes to the data.
    assert re.fullmatch("node2: (run folder|code|datasets): did not finish within 1 s", lines[1])
    assert lines[2:] == ["node3: did not start: it wrote nothing to the run folder"]


def test_a_node_on_another_file_system_is_guilty(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    allocation = Allocation(tmp_path, 2)
    other = tmp_path / "other"
    shutil.copytree(allocation.run_folder, other)
    limits = PATIENT | {"FILES_APPEAR_S": 0.0}
    allocation.start(0, limits)
    allocation.start(1, limits, run_folder=other)
    assert allocation.codes() == [1, 1]
    code, lines = allocation.judge(capfd)
    assert (code, allocation.guilty()) == (3, ["node2"])
    assert lines == [
        "node1: run folder: the files of node2 do not appear here: another file system, or not"
        " writable there",
        "node2: answered, but its report is missing from the run folder on the head node",
    ]


def test_a_taken_port_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    allocation = Allocation(tmp_path, 2)
    with socket.create_server(("", int(allocation.environment["MASTER_PORT"]))):
        allocation.start(0)
        assert allocation.codes() == [1]
    code, lines = allocation.judge(capfd)
    assert code == 3
    assert lines[0].startswith("node1: port 127.0.0.1:")
    assert lines[0].endswith(" is taken on this node")


@pytest.mark.parametrize(
    ("different", "line", "code"),
    [
        ({"min_free_memory_bytes": 1e18}, "node1: memory: ", 3),
        ({"scratch": "/nowhere"}, "node1: scratch /nowhere: cannot be written (", 3),
        ({"datasets": "/nowhere"}, "node1: datasets /nowhere: is missing", 1),
    ],
)
def test_a_single_node_is_blamed_for_what_lies_on_itself_only(
    tmp_path: Path,
    different: dict[str, Any],
    line: str,
    code: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    allocation = Allocation(tmp_path, 1)
    allocation.start(0, **different)
    assert allocation.codes() == [1]
    found, lines = allocation.judge(capfd)
    assert len(lines) == 1
    assert lines[0].startswith(line)
    assert found == code


def test_a_run_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    allocation = Allocation(tmp_path, 1)
    shutil.rmtree(allocation.run_folder / "attempts")
    (allocation.run_folder / "attempts").write_text("a file where a folder should be")
    allocation.start(0)
    allocation.nodes[0].join(HANGS_AFTER_S)
    place = f"run folder {allocation.results}: cannot be written (Not a directory)"
    assert allocation.output(0).read_text() == f"preflight: node1: {place}\n"
    assert allocation.nodes[0].exitcode == 1


@pytest.mark.parametrize(
    ("arguments", "different", "message"),
    [
        (["look"], {}, "usage: python -m slurm.preflight check|judge"),
        (["check"], {"attempt": ""}, "SLUICE_ATTEMPT is not set; the batch script"),
        (["check"], {"node_rank": "one"}, "SLUICE_NODE_RANK is not a number: 'one'"),
        (["judge"], {"attempt": "7"}, "{run}/attempts/7: its slurm.json lists no nodes"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path,
    arguments: list[str],
    different: dict[str, str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    allocation = Allocation(tmp_path, 2)
    environment = allocation.environment_of(0, **different)
    with mock.patch.dict(os.environ, environment, clear=True):
        assert preflight.main(arguments) == 2
    said = capfd.readouterr()
    assert said.err.startswith(f"error: preflight: {message.format(run=allocation.run_folder)}")
    assert said.err.count("\n") == 1


# ---- judgements -----------------------------------------------------------------------------


def report(tmp_path: Path, *failed: str, **different: Any) -> dict[str, Any]:
    """Return the report of a node in which these checks failed by its own fault."""
    written = Report(tmp_path, "node", 0)
    for name in failed:
        written.begin(name, guilty=True)
        written.failed(Unhealthy(f"{name}: is bad"))
    written.finish()
    return written.content | different


def blamed(findings: list[Finding]) -> set[str]:
    return {finding.node for finding in findings if finding.guilty}


NAMES = ["node1", "node2", "node3"]


def test_a_fault_of_all_nodes_is_nobodys_and_one_of_some_is_theirs(tmp_path: Path) -> None:
    well, bad = report(tmp_path), report(tmp_path, "datasets")
    assert find(NAMES, [well, well, well]) == []
    assert blamed(find(NAMES, [bad, well, bad])) == {"node1", "node3"}
    everywhere = find(NAMES, [bad, bad, bad])
    assert (blamed(everywhere), len(everywhere)) == (set(), 3)
    # The one that has a fault of its own besides is to blame for that.
    assert blamed(find(NAMES, [bad, bad, report(tmp_path, "datasets", "gpus")])) == {"node3"}


def test_nobody_started_is_nobodys_fault() -> None:
    findings = find(NAMES, [None, None, None])
    assert (blamed(findings), len(findings)) == (set(), 3)


@pytest.mark.parametrize("text", ['{"node": "node1", "checks": [', "", "[]", "{}", "\xff", "null"])
def test_a_damaged_report_makes_its_node_guilty(tmp_path: Path, text: str) -> None:
    (tmp_path / "node-1.json").write_bytes(text.encode("latin-1"))
    damaged = read_report(tmp_path / "node-1.json")
    assert damaged == "node-1.json is damaged"
    assert blamed(find(NAMES, [report(tmp_path), damaged, report(tmp_path)])) == {"node2"}


def test_of_nodes_that_were_killed_only_those_are_guilty_for_whom_the_others_waited(
    tmp_path: Path,
) -> None:
    well = report(tmp_path)
    waiting = report(tmp_path, during="rendezvous", done=False)
    reading = report(tmp_path, during="datasets", done=False)
    assert blamed(find(NAMES, [waiting, waiting, None])) == {"node3"}
    assert blamed(find(NAMES, [waiting, waiting, reading])) == {"node3"}
    assert blamed(find(NAMES, [waiting, waiting, waiting])) == set()
    assert blamed(find(NAMES, [well, well, waiting])) == {"node3"}


def test_a_node_that_did_not_answer_is_guilty_when_most_others_did(tmp_path: Path) -> None:
    well = report(tmp_path)
    assert blamed(find(NAMES, [well | {"missing": [2]}, well, well])) == {"node3"}
    assert blamed(find(NAMES, [well | {"missing": [1, 2]}, well, well])) == set()


def test_when_the_head_node_is_elsewhere_the_others_are_not_blamed(tmp_path: Path) -> None:
    head = report(tmp_path, "shared run folder", elsewhere=[0])
    assert blamed(find(NAMES, [head, None, None])) == {"node1"}


def test_the_largest_group_of_nodes_that_see_one_another() -> None:
    assert largest_group([[0, 1, 2], [0, 1, 2], [0, 1, 2]]) == {0, 1, 2}
    assert largest_group([[0, 1], [0, 1], [2]]) == {0, 1}
    assert largest_group([[0], [1, 2], [1, 2]]) == {1, 2}
    # Of two, the head node counts: the batch script runs there.
    assert largest_group([[0], [1]]) == {0}
    # A node that cannot write sees the others, and is not seen itself.
    assert largest_group([[0, 1], [0, 1], [0, 1]]) == {0, 1}


def test_a_clock_is_measured_by_the_median_of_all() -> None:
    assert skewed_clocks([100.0, 100.2, 99.9], 5) == {}
    assert skewed_clocks([100.0, 108.0, 100.1], 5) == {1: pytest.approx(7.9)}
    assert skewed_clocks([60.0, 100.0, 100.0], 5) == {0: -40.0}
    # Of two clocks none is in the middle; each is said to be off.
    assert skewed_clocks([100.0, 108.0], 5) == {0: -8.0, 1: 8.0}
    assert skewed_clocks([100.0, 104.0], 5) == {}


def test_the_node_between_two_slow_links_is_found() -> None:
    from slurm.health.collective import ring, rounds, slow_nodes

    # Links 0-1, 1-2, 2-3, 3-0.
    assert slow_nodes([9, 9, 9, 9], 4, 5) == []
    assert slow_nodes([1, 1, 9, 9], 4, 5) == [1]
    assert slow_nodes([9, 9, 1, 1], 4, 5) == [3]
    # A single slow link may be the fault of either end, and two nodes have no other.
    assert slow_nodes([1, 9, 9, 9], 4, 5) == []
    assert slow_nodes([1], 2, 5) == []
    # All are slow: the network, or the floor.
    assert slow_nodes([1, 1, 1, 1], 4, 5) == []
    assert slow_nodes([1, 1, 9], 3, 5) == [1]
    for num_nodes in range(2, 9):
        links = ring(num_nodes)
        parts = rounds(num_nodes)
        assert sorted(link for part in parts for link in part) == list(range(len(links)))
        for part in parts:
            ends = [end for link in part for end in links[link]]
            assert len(set(ends)) == len(ends)


def test_the_node_that_all_failed_connections_have_in_common_is_cut_off() -> None:
    assert cut_off([[], [], []]) == []
    assert cut_off([[2], [2], []]) == [2]
    assert cut_off([[], [], [0, 1]]) == [2]
    # One connection may be the fault of either end, and two nodes have no other.
    assert cut_off([[], [2], [1]]) == []
    assert cut_off([[1], [0]]) == []
    # Two of five have no connection at all; a network without any is nobody's fault.
    assert cut_off([[3, 4], [3, 4], [3, 4], [4], []]) == [3, 4]
    assert cut_off([[1, 2], [0, 2], [0, 1]]) == []
    # A node that cannot reach itself.
    assert cut_off([[], [1], []]) == [1]


def test_what_listens_is_reached_and_what_does_not_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        listener, address = listen(("127.0.0.1", head.getsockname()[1]))
        with listener:
            assert unreachable([address]) == []
        assert unreachable([head.getsockname(), address]) == [1]
    assert not wait_until_reachable(address, 0.2)


# ---- memory and GPUs ------------------------------------------------------------------------


def test_the_lowest_limit_of_the_groups_above_counts(tmp_path: Path) -> None:
    step = tmp_path / "slurm/job_1/step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path, "0::/slurm/job_1/step_0\n") is None
    (step.parent / "memory.max").write_text("8000\n")
    assert memory_limit(tmp_path, "0::/slurm/job_1/step_0\n") == 8000
    old = tmp_path / "memory/job_1"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("5000\n")
    assert memory_limit(tmp_path, "9:cpu:/job_1\n4:memory:/job_1\n0::/slurm/job_1\n") == 5000


def test_each_device_has_a_process_that_takes_part_in_the_all_reduce(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch.distributed as dist

    from slurm.health import gpus
    from slurm.health.collective import Place
    from slurm.health.gpus import Processes

    # They are new processes with torch, only in less time.
    context = node.context()
    monkeypatch.setattr(gpus.multiprocessing, "get_context", lambda _: context)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = Processes("cpu", 2, 0.9)
    try:
        processes.check()
        places = [
            Place(
                master_addr="127.0.0.1",
                master_port=store.port,
                device="cpu",
                rank=rank,
                world_size=2,
                local_rank=rank,
                local_world_size=2,
                floor_bytes_per_second=1e15,
                timeout_s=HANGS_AFTER_S,
            )
            for rank in range(2)
        ]
        found = processes.measure(places)
    finally:
        processes.end()
    assert [each.sum_is_right for each in found] == [True, True]
    assert found[0].bandwidth_bytes_per_second == found[1].bandwidth_bytes_per_second > 0
    # There is one node only, so no link to find.
    assert found[0].links_bytes_per_second is None


class NvmlError(Exception):
    pass


class NotSupported(NvmlError):
    pass


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ({}, None),
        ({"TotalEccErrors": 3}, "3 uncorrected memory errors since the driver was loaded"),
        ({"RetiredPagesPendingStatus": 1}, "memory pages are pending retirement; the GPU needs"),
        ({"RemappedRows": (5, 0, 1, 0)}, "memory rows are pending remapping; the GPU needs"),
        ({"RemappedRows": (0, 1, 0, 1)}, "the remapping of a memory row failed; the GPU needs"),
        ({"HandleByUUID": NvmlError("lost")}, "the driver does not answer (lost)"),
        ({"TotalEccErrors": NotSupported(), "RemappedRows": NotSupported()}, None),
    ],
)
def test_what_the_driver_holds_against_a_gpu(answers: dict[str, Any], problem: str | None) -> None:
    from slurm.health.gpus import driver_problem

    well = {"HandleByUUID": "gpu", "TotalEccErrors": 0, "RetiredPagesPendingStatus": 0}
    well |= {"RemappedRows": (0, 0, 0, 0)}

    def answer(value: Any) -> Any:
        def function(*arguments: Any) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        return function

    nvml = SimpleNamespace(
        NVMLError=NvmlError,
        NVMLError_NotSupported=NotSupported,
        NVMLError_NoPermission=NotSupported,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlInit=answer(None),
        **{f"nvmlDeviceGet{name}": answer(value) for name, value in (well | answers).items()},
    )
    found = driver_problem(nvml, "GPU-1234")
    assert found == problem or (problem and found and found.startswith(problem))


def test_settings_are_typed(tmp_path: Path) -> None:
    allocation = Allocation(tmp_path, 2)
    settings = Settings.of_this_node(allocation.environment_of(1, gpus_per_node=3, device="cuda"))
    assert (settings.num_nodes, settings.node_rank, settings.attempt) == (2, 1, 1)
    assert (settings.node_name, settings.datasets) == ("node2", tmp_path / "datasets")
    assert settings.min_free_gpu_fraction == 0.9
    assert settings.interface == ""
    assert settings.processes_per_node == 3
    # In the image the scratch folder is /tmp, and nobody says so.
    inside = {k: v for k, v in allocation.environment_of(0).items() if k != "SLUICE_SCRATCH"}
    assert Settings.of_this_node(inside).scratch == Path("/tmp")
