"""program.py, rider.py: a script that is not ours, on one rank and on two, without a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from runfolder import heartbeats
from runfolder.ports import free_port
from tests import waiting
from tests.shared import CHECKOUT

# A step of plain torch: no accelerate, which takes seconds to import.
STEPS = """
import os, sys, torch
from torch import nn
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step(seed=0):
    torch.manual_seed(seed)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


class Ride:
    """A run folder with a script in it, and the processes that run it as slurm/node.sh does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.code = folder / "code"
        (self.code / "script").mkdir(parents=True)
        for name in ("train", "runfolder"):
            (self.code / name).symlink_to(CHECKOUT / name)
        self.folder.mkdir()

    def start(
        self,
        text: str,
        *words: str,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        **config: Any,
    ) -> list[subprocess.Popen[str]]:
        """Start a script on all ranks."""
        (self.code / "script/mine.py").write_text(text)
        content = {
            "program": {"kind": "script", "name": "script/mine.py"},
            "arguments": list(words),
            "resume_arguments": ["--resume"],
            "independent_ranks": False,
            "dry_run": False,
            "dry_run_steps": 3,
        }
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(content | config))
        command = [sys.executable, "-m", "train.rider", "train.program", "--config", str(path)]
        shared = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.code),
            "SLUICE_RUN_FOLDER": str(self.folder),
            "SLUICE_WORLD_SIZE": str(ranks),
            "SLUICE_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        return [
            subprocess.Popen(
                command,
                cwd=self.code,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def run(self, text: str, *words: str, **more: Any) -> list[subprocess.CompletedProcess[str]]:
        """Run a script on all ranks to the end."""
        return [waiting.finish(process) for process in self.start(text, *words, **more)]

    def one(self, text: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a script on one rank to the end."""
        (done,) = self.run(text, *words, **more)
        return done

    @property
    def steps(self) -> list[int]:
        """What the ranks have counted."""
        attempt = self.folder / "attempts/1"
        paths = sorted((attempt / "heartbeats").glob("*.json"))
        return [heartbeats.read(attempt, int(path.stem))["steps"] for path in paths]


@pytest.fixture
def ride(tmp_path: Path) -> Ride:
    return Ride(tmp_path)


def lines_of(done: Sequence[subprocess.CompletedProcess[str]]) -> list[str]:
    return [line for one in done for line in one.stderr.splitlines()]


# ---- how it is started ----


def test_a_script_finds_its_own_folder_words_and_modules_and_writes_into_the_run(
    ride: Ride,
) -> None:
    (ride.code / "script/train.py").write_text("mine = 7\n")
    text = "import sys, train, os; open('here', 'w'); print(train.mine, sys.argv[1:], __name__)"
    done = ride.one(text, "--lr", "a b")
    assert (done.returncode, done.stdout) == (0, "7 ['--lr', 'a b'] __main__\n"), done.stderr
    assert (ride.folder / "here").exists()


def test_its_process_has_no_way_back_to_ours(ride: Ride) -> None:
    text = "import sys, os, subprocess\nprint([p for p in sys.path if 'code' in p])\n"
    text += "print(repr(os.environ['PYTHONPATH']))\nimport runfolder"
    done = ride.one(text)
    assert done.returncode == 1
    assert done.stdout == f"['{ride.code}/script']\n''\n"
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'runfolder'"


def test_the_second_attempt_is_told_to_resume(ride: Ride) -> None:
    text = "import sys; print(sys.argv[1:])"
    assert ride.one(text, "a").stdout == "['a']\n"
    second = ride.one(text, "a", environment={"SLUICE_ATTEMPT": "2"})
    assert second.stdout == "['a', '--resume']\n"


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [("module", "json.tool", "usage: "), ("command", "pytest", "pytest ")],
    ids=["module", "command"],
)
def test_a_module_and_a_command_run_as_by_their_own_names(
    ride: Ride, kind: str, name: str, said: str
) -> None:
    word = "--version" if kind == "command" else "--help"
    done = ride.one("", word, program={"kind": kind, "name": name})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said)


@pytest.mark.parametrize("words", [("--find=module", "nosuch"), ("--find=command", "nosuch")])
def test_what_is_not_installed_is_one_line(words: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "train.program", *words]
    done = waiting.run(command, cwd=CHECKOUT, env=dict(os.environ))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nosuch" in done.stderr


# ---- how it ends ----


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", 0),
        ("import sys; sys.exit(75)", 75),
        ("import sys; sys.exit(2)", 2),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('words')", 1),
        (STEPS + "step()\nsys.exit(2)", 1),
    ],
    ids=["ends", "75", "2 at once", "3", "a message", "2 after a step"],
)
def test_its_exit_code_is_its_own_but_for_a_late_2(ride: Ride, text: str, code: int) -> None:
    assert ride.one(text).returncode == code


def test_a_traceback_begins_in_the_script(ride: Ride) -> None:
    done = ride.one("def f():\n    raise ValueError('no')\nf()\n")
    assert done.returncode == 1
    first, second, *_, last = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert "script/mine.py" in second
    assert last == "ValueError: no"


def test_what_a_script_leaves_for_its_exit_is_done(ride: Ride) -> None:
    text = "import atexit; atexit.register(lambda: print('bye'))"
    assert ride.one(text).stdout == "bye\n"


# ---- steps ----


def test_steps_are_counted_and_told_at_the_end(ride: Ride) -> None:
    done = ride.one(STEPS + "for _ in range(7): step()")
    assert done.returncode == 0, done.stderr
    assert ride.steps == [7]


def test_of_two_optimizers_the_busier_counts(ride: Ride) -> None:
    more = "other = torch.optim.SGD(model.parameters(), lr=0.1)\n"
    more += "for _ in range(3): step(); step(); other.step()"
    assert ride.one(STEPS + more).returncode == 0
    assert ride.steps == [6]


def test_a_dry_run_ends_after_a_few_steps_and_leaves_what_lies_behind_undone(ride: Ride) -> None:
    done = ride.one(STEPS + "while True: step()", dry_run=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "dry run: ended after 3 optimizer steps\n"


def test_a_dry_run_ends_though_the_script_catches_everything(ride: Ride) -> None:
    loop = "while True:\n    try:\n        step()\n    except:\n        print('again')\n"
    done = ride.one(STEPS + loop, dry_run=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "dry run: ended after 3 optimizer steps\nagain\n"


def test_usr2_prints_the_stacks_of_all_threads_and_nothing_ends(ride: Ride) -> None:
    text = (
        "import os, signal, sys\ndef waits():\n    os.kill(os.getpid(), signal.SIGUSR2)\nwaits()\n"
    )
    done = ride.one(text + "print('on')")
    assert (done.returncode, done.stdout) == (0, "on\n")
    assert "in waits" in done.stderr


# ---- copies ----


def test_a_script_that_joins_no_process_group_is_stopped_before_its_first_step(
    ride: Ride,
) -> None:
    text = STEPS + "before = model.weight.clone()\nstep()\nopen('stepped', 'w')"
    done = ride.run(text, ranks=2)
    assert [one.returncode for one in done] == [2, 2]
    (line,) = lines_of(done)
    assert line.startswith("error: the script took an optimizer step in a process group of 1")
    assert not (ride.folder / "stepped").exists()


JOINED = STEPS + "import torch.distributed as dist\ndist.init_process_group('gloo')\n"


# Each is found, however far one rank is ahead: at the latest by the one that ends last.
@pytest.mark.parametrize(
    ("loop", "more"),
    [
        ("for _ in range(100): step(dist.get_rank()); dist.barrier()", {}),
        ("for _ in range(3): step(dist.get_rank())", {}),
        (
            "while dist.get_rank() and not os.path.exists('ahead'): time.sleep(0.01)\n"
            "for _ in range(5): step(dist.get_rank())\nopen('ahead', 'w')",
            {},
        ),
        ("while True: step(dist.get_rank())", {"dry_run": True}),
        # One model is wrapped and averaged, and another is trained.
        (
            "wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))\n"
            "for _ in range(5): step(dist.get_rank())",
            {},
        ),
    ],
    ids=["in step", "short", "one far ahead", "dry run", "another is wrapped"],
)
def test_ranks_that_do_not_average_their_gradients_are_stopped(
    ride: Ride, loop: str, more: dict[str, Any]
) -> None:
    done = ride.run(JOINED + "import time\n" + loop, ranks=2, **more)
    assert 2 in [one.returncode for one in done], [one.stderr for one in done]
    (line,) = [line for line in lines_of(done) if line.startswith("error: ")]
    assert "hold different weights" in line


def test_a_second_model_that_is_not_averaged_is_found_too(ride: Ride) -> None:
    text = JOINED + (
        "both = [nn.parallel.DistributedDataParallel(nn.Linear(4, 1)), nn.Linear(4, 1)]\n"
        "optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in both]\n"
        "for i in range(5):\n"
        "    torch.manual_seed(10 * i + dist.get_rank())\n"
        "    for m, o in zip(both, optimizers):\n"
        "        m(torch.randn(8, 4)).square().mean().backward()\n"
        "        o.step()\n"
        "        o.zero_grad()\n"
        "    dist.barrier()\n"
    )
    done = ride.run(text, ranks=2)
    assert 2 in [one.returncode for one in done], [one.stderr for one in done]
    assert any("hold different weights" in line for line in lines_of(done))


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("model = nn.parallel.DistributedDataParallel(model)", {}),
        (
            "def average(*_):\n    for p in model.parameters(): dist.all_reduce(p.grad)\n"
            "optimizer.register_step_pre_hook(average)",
            {},
        ),
        ("", {"independent_ranks": True}),
    ],
    ids=["ddp", "by hand", "on purpose"],
)
def test_ranks_that_stay_in_step_or_need_not_are_left_alone(
    ride: Ride, text: str, more: dict[str, Any]
) -> None:
    text = (
        JOINED
        + "torch.manual_seed(0)\nnn.init.ones_(model.weight)\nnn.init.ones_(model.bias)\n"
        + text
    )
    text += (
        "\nfor i in range(6): step(dist.get_rank()); dist.barrier()\ndist.destroy_process_group()"
    )
    done = ride.run(text, ranks=2, **more)
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert ride.steps == [6, 6]


@pytest.mark.parametrize("accel", ["zero2", "fsdp2"])
def test_a_script_that_trains_in_another_way_than_asked_is_stopped(ride: Ride, accel: str) -> None:
    done = ride.one(STEPS + "step()", environment={"SLUICE_ACCEL": accel})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: ACCEL={accel}: the script")
