"""The commands of the README, and which of the tests runs each."""

from __future__ import annotations

import re

from tests.shared import CHECKOUT

# Run by other tests, with more around them; the file holds the words by which it does.
ELSEWHERE = {
    "make dry-run": (
        "tests/real/test_make.py",
        'run("make", "dry-run", f"ACCEL={accel}"',
        '"ddp"',
    ),
    "make test": ("tests/fast/test_makefile.py", '"test"', "checkout.words(target"),
    "make test-real": ("tests/fast/test_makefile.py", '"test-real"', "checkout.words(target"),
    "containers/install-apptainer.sh": (
        "tests/real/containers/test_install_apptainer.py",
        '"containers/install-apptainer.sh"',
    ),
    "make build-image VARIANT=cpu BASE=debian": (
        "tests/real/whole_image.py",
        '"make", "build-image", "VARIANT=cpu", "BASE=debian"',
    ),
    "make dry-run ACCEL=zero3": (
        "tests/real/containers/test_container_runs.py",
        'make("dry-run", "ACCEL=zero3",',
    ),
    **{
        f"make dry-run JOB={lab}": (
            "tests/real/test_make.py",
            'run("make", "dry-run", f"JOB={job}"',
            f'"{lab}"',
        )
        for lab in ("ag_news", "causal_lm", "imdb", "rag", "chat")
    },
    "make dry-run JOB=../fit/fit.yaml": (
        "tests/real/test_make.py",
        'run("make", "dry-run", "JOB=../fit/fit.yaml"',
    ),
    "make submit JOB=../fit/fit.yaml NODES=2": (
        "tests/real/slurm/test_own_scripts.py",
        'submit(f"JOB=../fit/{name}.yaml", "NODES=2"',
        '"fit"',
    ),
    'make ask RUN=rag Q="How do sailors know which lighthouse they see?"': (
        "tests/real/test_make.py",
        'run("make", "ask", "RUN=rag", "Q=How do sailors',
    ),
    "make chat RUN=chat": ("tests/real/test_make.py", 'run("make", "chat", "RUN=chat"'),
    "make cluster-up": ("tests/real/cluster/test_new_user.py", 'make("cluster-up"'),
    'make submit NODES=2 ARGS="--dry_run"': (
        "tests/real/cluster/test_new_user.py",
        'make("submit", "NODES=2", "ARGS=--dry_run")',
    ),
    "make logs RUN=tinyllama": (
        "tests/real/cluster/test_new_user.py",
        'make("logs", "RUN=tinyllama")',
    ),
    "make cluster-down": ("tests/real/cluster/test_new_user.py", 'make("cluster-down")'),
}
# What no test can run, and why not.
NOWHERE = {
    "make build-image": "the CUDA image, from Docker's registry",
    "make fetch JOB=tinyllama": "a model of 2 GB, from the hub",
    "make run JOB=tinyllama ACCEL=zero2 NPROC=8": "8 GPUs",
}


def commands() -> list[str]:
    """Return the lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def run_one_after_the_other() -> list[str]:
    """Return those that tests/real/test_readme.py runs, as a user who reads on would."""
    return [line for line in commands() if line not in ELSEWHERE and line not in NOWHERE]
