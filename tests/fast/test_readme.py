"""The README against the tree: its commands are run by a test, its table and links are right."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cluster.plan.job import load_job
from tests import waiting
from tests.readme import ELSEWHERE, NOWHERE, commands, run_one_after_the_other
from tests.shared import CHECKOUT


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_command_that_is_run_elsewhere_is_run_there(command: str) -> None:
    path, *words = ELSEWHERE[command]
    text = (CHECKOUT / path).read_text()
    assert [word for word in words if word not in text] == []


def test_the_others_are_run_one_after_the_other() -> None:
    targets = [line.split()[1] for line in run_one_after_the_other()]
    assert targets == ["run", "run", "generate", "export"]


def test_no_command_is_listed_that_the_readme_has_no_more() -> None:
    assert set(NOWHERE) | set(ELSEWHERE) - {"make test-real"} <= set(commands())


def test_every_target_of_the_table_exists_and_none_is_missing() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    table = set(re.findall(r"`make ([a-z-]+)`", readme.split("## Targets")[1].split("## ")[0]))
    listed = waiting.run(["make", "help"], cwd=CHECKOUT, env=os.environ).stdout
    targets = set(re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE))
    assert table == targets - {"clean"}


def test_links_lead_somewhere() -> None:
    for page in [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_jobs_of_the_page_on_new_jobs_are_jobs(tmp_path: Path) -> None:
    page = (CHECKOUT / "docs/new-job.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "line.py").write_text(script)
    known = set(re.findall(r'add_argument\("(--\w+)"', script))
    first, second = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for text in (first, second):
        (tmp_path / "line.yaml").write_text(text)
        program = load_job(str(tmp_path / "line.yaml")).program
        assert program is not None
        words = [*program.arguments, *program.resume_arguments]
        assert {word for word in words if word.startswith("--")} == known


def test_the_scripts_of_the_page_of_examples_are_those_that_are_run() -> None:
    page = (CHECKOUT / "docs/script-examples.md").read_text()
    shown = re.findall(r"```(python|yaml)\n(.*?)```", page, re.DOTALL)
    names = {"python": ".py", "yaml": ".yaml"}
    files = [path for path in (CHECKOUT / "tests/real/fit").iterdir() if path.stem != "saves"]
    assert sorted((names[kind], text) for kind, text in shown) == sorted(
        (path.suffix, path.read_text()) for path in files
    )


def test_the_tests_that_pages_name_are_there() -> None:
    sources = {path: path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py")}
    for page in [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")]:
        text = page.read_text()
        for path in re.findall(r"\btests/[\w/]+\.py\b", text):
            assert (CHECKOUT / path).is_file(), f"{page.name}: {path}"
        for name in re.findall(r"`(test_\w+)`", text):
            found = any(f"def {name}(" in source for source in sources.values())
            assert found, f"{page.name}: {name}"
