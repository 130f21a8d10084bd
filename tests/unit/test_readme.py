"""The README's commands are real: each is run here, or said to be run elsewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

# Run by others: this test is part of the first, the image is built and used in tests/image, the
# cluster in tests/cluster, the rest needs a hub or a GPU.
RUN_ELSEWHERE = {
    "make test": "",
    "containers/install-apptainer.sh": "tests/conftest.py",
    "make build-image VARIANT=cpu BASE=debian": "tests/conftest.py",
    "make dry-run ACCEL=zero3": "tests/image/test_container_runs.py",
    **{
        f"make dry-run JOB={lab}": "tests/distributed/test_make.py"
        for lab in ("ag_news", "causal_lm", "imdb", "rag")
    },
    'make ask RUN=rag Q="How do sailors know which lighthouse they see?"': (
        "tests/distributed/test_make.py"
    ),
    "make cluster-up": "tests/cluster/test_new_user.py",
    'make submit NODES=2 ARGS="--dry_run"': "tests/cluster/test_new_user.py",
    "make logs RUN=tinyllama": "tests/cluster/test_new_user.py",
    "make cluster-down": "tests/cluster/test_new_user.py",
    "make build-image": "",
    "make fetch JOB=tinyllama": "tests/unit/train/test_hub.py",
    "make run JOB=tinyllama ACCEL=zero2 NPROC=8": "tests/unit/train/test_hub.py",
}


NOT_CODE = (".git", ".apptainer", ".venv", "runs", "datasets", "cache", "images", "__pycache__")


def commands() -> list[str]:
    """Return the lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout in which a user has put some text."""
    copy = tmp_path_factory.mktemp("user") / "sluice"
    not_code = shutil.ignore_patterns(*NOT_CODE)
    shutil.copytree(CHECKOUT, copy, ignore=not_code)
    shutil.copytree(copy / "train/samples", copy / "my-text", ignore=shutil.ignore_patterns("*.md"))
    return copy


def test_every_command_runs_in_the_order_of_the_readme(
    checkout: Path, clean_environment: dict[str, str]
) -> None:
    environment = {k: v for k, v in clean_environment.items() if k != "SLUICE_DATASETS"}
    environment["VENV"] = sys.prefix
    ran = []
    for command in commands():
        if command in RUN_ELSEWHERE:
            continue
        # Two steps instead of 300: the road is the same.
        shortened = command.replace("--max_steps 300", "--max_steps 2")
        done = subprocess.run(
            shlex.split(shortened),
            check=False,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{shortened}\n{done.stdout}\n{done.stderr}"
        ran.append(command)
    assert len(ran) >= 5
    assert (checkout / "my-model/config.json").is_file()


def test_every_target_of_the_table_exists_and_none_is_missing() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    table = set(re.findall(r"`make ([a-z-]+)`", readme.split("## Targets")[1].split("## ")[0]))
    listed = subprocess.run(
        ["make", "help"], check=True, cwd=CHECKOUT, capture_output=True, text=True
    ).stdout
    targets = set(re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE))
    assert table == targets - {"clean"}


def test_links_lead_somewhere() -> None:
    for page in [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
