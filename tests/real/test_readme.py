"""The README's commands, one after the other in a fresh checkout, as a user who reads on."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests import waiting
from tests.checkout import lay_out
from tests.readme import run_one_after_the_other


@pytest.mark.computes(2)
def test_the_commands_run_in_the_order_of_the_readme(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    checkout = lay_out(tmp_path / "sluice")
    # Some text of the user's own.
    (checkout / "my-text").mkdir()
    for file in (checkout / "train/samples").glob("*.txt"):
        shutil.copy2(file, checkout / "my-text")
    environment = {k: v for k, v in clean_environment.items() if k != "SLUICE_DATASETS"}
    environment["VENV"] = sys.prefix
    for command in run_one_after_the_other():
        # Two steps instead of 300, and less to evaluate: the road is the same.
        fewer = "--max_steps 2 --evaluation.max_tokens 2000"
        shortened = command.replace("--max_steps 300", fewer)
        done = waiting.run(shlex.split(shortened), cwd=checkout, env=environment)
        assert done.returncode == 0, f"{shortened}\n{done.stdout}\n{done.stderr}"
    assert (checkout / "my-model/config.json").is_file()
