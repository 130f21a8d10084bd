"""The Makefile: what it hands on, with stand-ins for the environment and its Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import waiting
from tests.checkout import lay_out
from tests.shared import CHECKOUT


class Checkout:
    """A folder with the Makefile, a venv.sh that does nothing and a Python that notes its words."""

    def __init__(self, root: Path) -> None:
        self.root = root
        lay_out(root, "Makefile", "slurm/isolated.sh")
        self.program("containers/venv.sh", 'echo "$@" >> set-up')
        self.noted = root / "noted"
        # -S, because starting Python is all that the stand-in does.
        words = f"open({str(self.noted)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
        self.program(
            "an env/bin/python",
            f"""{sys.executable} -IS -c "import json, sys; {words}" "$@"
            exit "${{STATUS:-0}}" """,
        )

    def program(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Nothing of a make that runs these tests; HOME so that no file of the user matters.
        settings = {"PATH": os.environ["PATH"], "HOME": str(self.root), "VENV": "an env"}
        return waiting.run(["make", *arguments], cwd=self.root, env=settings | environment)

    def words(self, *arguments: str, **environment: str) -> list[str]:
        """The words of the one Python command that `make ARGUMENTS` runs."""
        done = self.make(*arguments, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        [line] = self.noted.read_text(encoding="utf-8").splitlines()
        self.noted.unlink()
        words = json.loads(line)
        assert isinstance(words, list)
        return words


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_help_is_the_default_and_lists_every_target_and_variable(checkout: Checkout) -> None:
    done = checkout.make()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == checkout.make("help").stdout
    text = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    phony = " ".join(re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE))
    listed = re.findall(r"^  (\S+) ", done.stdout, re.MULTILINE)
    # What sets up an environment is run by the others; it is for people only where it says so.
    silent = {"setup", "setup-dev"}
    targets = [target for target in phony.split() if target not in silent]
    variables = (
        "JOB ACCEL NPROC NODES GPUS TIME NAME RUN VARIANT BASE EXTRA KEY PROMPT RUNTIME IMAGE "
        "ARGS PROMPT_FILE MODEL PLAN FORMAT NODE DRILL CMD PORT Q GRID MAX"
    )
    assert sorted(listed) == sorted([*targets, *variables.split()])
    assert not (checkout.root / "set-up").exists(), "help needs no environment"
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("target", ["dry-run", "run", "fetch"])
def test_a_training_target_makes_the_environment_and_hands_the_job_on(
    checkout: Checkout, target: str
) -> None:
    words = checkout.words(target)
    assert words[:3] == ["-m", "cluster", "run"]
    assert "--job=tinyllama" in words
    assert not [word for word in words if word.startswith(("--accel", "--name", "--run="))]
    # What trains is added by the command itself, if it is to run on the host.
    assert (checkout.root / "set-up").read_text(encoding="utf-8") == "--base\n"


def test_every_value_arrives_as_one_word(checkout: Checkout) -> None:
    value = """it's "a $HOME; `name` \\ *"""
    words = checkout.words("run", f"NAME={value.replace('$', '$$')}", "RUN=a/b", "ACCEL=zero2")
    assert {f"--name={value}", "--run=a/b", "--accel=zero2"} <= set(words)


@pytest.mark.parametrize(
    "text",
    [
        "say $HOME",
        "@file",
        """two\nlines\n\n # it's "quoted" `name` $$x$$ $(shell touch bad) $(""",
        "  spaces at the end  ".lstrip(),
        "a line's end \\\nand \\",
        "",
    ],
)
def test_a_prompt_arrives_as_it_was_typed(checkout: Checkout, text: str) -> None:
    words = checkout.words("generate", "RUN=x", f"PROMPT={text}")
    assert words[-1] == f"--prompt={text}"
    assert not (checkout.root / "bad").exists()


@pytest.mark.parametrize(("target", "name"), [("ask", "Q"), ("ssh", "CMD")])
def test_make_runs_nothing_of_a_text(checkout: Checkout, target: str, name: str) -> None:
    text = "echo $(shell touch bad) $("
    assert checkout.words(target, f"{name}={text}")[-1].partition("=")[2] == text
    assert not (checkout.root / "bad").exists()


def test_without_a_prompt_none_is_handed_on_nor_one_of_the_environment(checkout: Checkout) -> None:
    # zsh's own prompt, exported; MODEL may be anything.
    given = {"PROMPT": "%n@%m %# ", "MODEL": "x-7"}
    words = ["-m", "cluster", "train-module", "train.generate", "--run=x", "--"]
    assert checkout.words("generate", "RUN=x", **given) == words
    words = checkout.words("generate", "MODEL=a model", "PROMPT_FILE=my $file")
    assert words[-3:] == ["--model=a model", "--", "--prompt_file=my $file"]
    assert checkout.words("chat", "MODEL=m", "ARGS=--seed 1")[3:] == [
        *("train.chat", "--model=m", "--", "--seed", "1"),
    ]


def test_args_are_split_as_the_user_wrote_them(checkout: Checkout) -> None:
    words = checkout.words("run", """ARGS=--max_steps 5 --text "two words" --glob '*' """)
    assert words[words.index("--") + 1 :] == [
        "--max_steps", "5", "--text", "two words", "--glob", "*",
    ]  # fmt: skip


def test_name_and_time_are_not_taken_from_the_environment(checkout: Checkout) -> None:
    words = checkout.words("run", NAME="LAPTOP-7", TIME="%E", ACCEL="zero1")
    assert not [word for word in words if word.startswith(("--name", "--time"))]
    assert "--accel=zero1" in words
    assert checkout.words("status", FORMAT="%E") == ["-m", "cluster", "status"]
    assert checkout.words("logs", NODE="LAPTOP-7", RUN="x")[-1] == "--run=x"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "JBO=x"], "JBO= is not a variable of `make submit`; did you mean JOB=?"),
        (["submit", "job=x"], "job= is not a variable of `make submit`; did you mean JOB=?"),
        (["submit", "NODE=2"], "NODE= is not a variable of `make submit`; did you mean NODES=?"),
        (["run", "TIMES=1:00"], "TIMES= is not a variable of `make run`; did you mean TIME=?"),
        (["cancel", "ZZZ=1"], "ZZZ= is not a variable of `make cancel`; it takes RUN NAME"),
        (["logs", "JOB=x"], "JOB= is not a variable of `make logs`"),
        (["lint", "RUN=x"], "RUN= is not a variable of `make lint`"),
        (["JBO=x"], "JBO= is not a variable of `make help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_variable_that_the_target_does_not_use_is_refused(
    checkout: Checkout, words: list[str], said: str
) -> None:
    done = checkout.make(*words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line
    assert not (checkout.root / "set-up").exists()


def test_a_file_of_packages_reaches_the_image_or_the_environment_and_no_other_target(
    checkout: Checkout,
) -> None:
    def set_up(*words: str, **environment: str) -> tuple[int, str]:
        done = checkout.make(*words, **environment)
        assert len(done.stderr.splitlines()) == (1 if done.returncode else 0)
        return done.returncode, done.stderr

    checkout.program("containers/build.sh", 'echo "build $EXTRA" >> set-up')
    assert set_up("setup-train", "EXTRA=my packages.txt") == (0, "")
    assert set_up("build-image", "EXTRA=my packages.txt") == (0, "")
    # Other programs may use the variable.
    assert set_up("setup-train", EXTRA="-O3") == (0, "")
    assert set_up("build-image", EXTRA="-O3") == (0, "")
    lines = (checkout.root / "set-up").read_text().splitlines()
    assert lines == ["--extra=my packages.txt", "build my packages.txt", "", "build "]
    for words, said in (
        (["run", "EXTRA=x"], "EXTRA= is not a variable of `make run`"),
        (["build-image", "EXTRA="], "EXTRA= is empty: give a requirements file"),
    ):
        code, error = set_up(*words)
        assert code == 2
        assert said in error


def test_every_target_says_which_variables_it_uses() -> None:
    text = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    phony = " ".join(re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)).split()
    assert sorted(re.findall(r"^uses\.(\S+) =", text, re.MULTILINE)) == sorted(phony)


def test_what_other_programs_read_may_be_given_to_any_target(checkout: Checkout) -> None:
    words = ["SLUICE_RUNS=x", "VENV=an env", "HF_HOME=x", "https_proxy=x", "PIP_INDEX_URL=x"]
    assert checkout.words("status", *words) == ["-m", "cluster", "status"]


def test_a_run_without_a_name_is_refused(checkout: Checkout) -> None:
    # It would be taken for a new one.
    for target in ("submit", "run"):
        done = checkout.make(target, "RUN=")
        assert done.returncode == 2
        assert "RUN= is empty: give the run" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not checkout.noted.exists()


def test_a_failure_is_passed_on(checkout: Checkout) -> None:
    done = checkout.make("run", STATUS="3")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, "make's own line, and no other"


def test_no_training_starts_when_the_environment_cannot_be_made(checkout: Checkout) -> None:
    checkout.program("containers/venv.sh", "echo 'error: no' >&2; exit 2")
    done = checkout.make("dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no\n")
    assert not checkout.noted.exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        # Without a folder: pyproject.toml names that of the fast tests.
        ("test", "--dist loadfile --no-loadscope-reorder --numprocesses auto"),
        (
            "test-real",
            "--dist loadfile --no-loadscope-reorder --numprocesses 6 -o testpaths=tests/real",
        ),
        ("drills", "-o testpaths=tests/drills"),
    ],
)
def test_the_tests_get_their_tools_their_folder_and_their_arguments(
    checkout: Checkout, target: str, words: str
) -> None:
    expected = ["-m", "pytest", *words.split(), "-k", "checkpoint"]
    assert checkout.words(target, "ARGS=-k checkpoint") == expected
    assert (checkout.root / "set-up").read_text(encoding="utf-8") == "--dev\n"
    for word in words.split():
        if word.startswith("testpaths="):
            assert (CHECKOUT / word.partition("=")[2]).is_dir()
