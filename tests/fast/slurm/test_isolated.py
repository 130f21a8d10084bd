"""isolated.sh: no Python of ours takes what the caller's environment has for another one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.plan import container
from cluster.plan.runtime import Runtime
from runfolder import launch
from tests import waiting
from tests.shared import CHECKOUT

# What a module of a cluster brings along: older packages of the names that ours import, and a
# standard library's.
NAMES = ("rich", "yaml", "numpy", "paramiko", "jsonargparse", "torch", "pip", "dataclasses")
SHOW = (
    "import json, os, sys, yaml; print(json.dumps([sys.path, sys.flags.optimize, yaml.__file__, "
    "sorted(name for name in os.environ if name.startswith('PYTHON'))]))"
)


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """An environment in which each of these packages is another, and ends the process."""
    folder = tmp_path / "module"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    user = tmp_path / "user"
    site = user / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    site.mkdir(parents=True)
    (site / "usercustomize.py").write_text("raise SystemExit('the wrong start')\n")
    startup = folder / "startup"
    startup.write_text("raise SystemExit('the wrong start')\n")
    return {
        "PYTHONPATH": str(folder),
        "PYTHONHOME": "/usr/nowhere",
        "PYTHONSTARTUP": str(startup),
        "PYTHONUSERBASE": str(user),
        "PYTHONSAFEPATH": "1",
        "PYTHONINSPECT": "1",
        "PYTHONOPTIMIZE": "2",
        "PYTHONWARNINGS": "error",
        "PYTHONPLATLIBDIR": "lib64",
    }


def output(*words: str | Path, **environment: str) -> str:
    """Return what a command prints that has to succeed, without a word on stderr."""
    done = waiting.run([*map(str, words)], cwd=CHECKOUT, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_a_python_starts_as_in_an_environment_without_a_word_for_it(
    hostile: dict[str, str],
) -> None:
    words = ("slurm/isolated.sh", sys.executable, "-c", SHOW)
    kept = {"PATH": os.environ["PATH"], "PYTHONUTF8": "1", "PYTHON": "/usr/bin/python3"}
    found = json.loads(output(*words, **kept, **hostile))
    assert found == json.loads(output(*words, **kept))
    # PYTHONFAULTHANDLER: tests/waiting.py.
    assert found[3] == ["PYTHON", "PYTHONFAULTHANDLER", "PYTHONNOUSERSITE", "PYTHONUTF8"]


def test_what_the_site_sets_for_training_processes_reaches_them(hostile: dict[str, str]) -> None:
    words = ("slurm/isolated.sh", "--keep=NCCL_DEBUG|PYTHONPATH", "env")
    lines = output(*words, PATH=os.environ["PATH"], **hostile).splitlines()
    assert f"PYTHONPATH={hostile['PYTHONPATH']}" in lines
    assert not [line for line in lines if line.startswith("PYTHONHOME")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status", "FORMAT=json"), '"runs": []'),
        (("run", "RUNTIME=host", "ARGS=--help"), "--max_steps"),
        (("ssh", "CMD=x"), "no host is set"),
    ],
    ids=["status", "run", "ssh"],
)
def test_make_says_the_same_whatever_a_module_has_set(
    words: tuple[str, ...],
    said: str,
    hostile: dict[str, str],
    clean_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        '[slurm]\npartition = "x"\ncpus_per_node = 1\ngpus_per_node = 0\n'
        f'[paths]\nscratch = "/tmp"\nruns = "{tmp_path}/runs"\n'
    )
    given = clean_environment | {"VENV": sys.prefix, "SLUICE_SITE": str(site)}
    make = ["make", "--no-print-directory", *words]
    expected = waiting.run(make, cwd=CHECKOUT, env=given)
    done = waiting.run(make, cwd=CHECKOUT, env=given | hostile)
    assert (done.returncode, done.stdout, done.stderr) == (
        expected.returncode,
        expected.stdout,
        expected.stderr,
    )
    assert said in expected.stdout + expected.stderr


def test_the_python_of_a_node_is_isolated(hostile: dict[str, str], tmp_path: Path) -> None:
    """What slurm/environment.sh gives to the launcher, the preflight and the board."""
    values = dict.fromkeys(["image", "apptainer", "binds", "container_flags", "site_variables"], "")
    values |= {"datasets": "/d", "cache": "/c", "host_python": sys.executable}
    launch.write(tmp_path, values, {"SLUICE_DEVICE": "cpu"})
    needed = {"SLUICE_RUN_FOLDER": str(tmp_path), "SLUICE_SCRATCH": str(tmp_path)}
    # Modules are loaded on the node, after the job was given its environment.
    program = "import subprocess, sys; import numpy, yaml; print(numpy.__file__)"
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}], check=1)"
    script = f'set -euo pipefail; source slurm/environment.sh; "${{python[@]}}" -c "{worker}"'
    said = output("bash", "-c", script, PATH=os.environ["PATH"], **needed, **hostile)
    assert Path(said.strip()).is_relative_to(sys.prefix)


def test_a_command_of_the_training_side_is_isolated_on_the_host(
    hostile: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shows.py").write_text(
        "import os, pathlib, sys, yaml\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{yaml.__file__}\\n{os.environ[\"PYTHONPATH\"]}')\n"
    )
    monkeypatch.chdir(CHECKOUT)
    code = container.call(
        Runtime(),
        "shows",
        [str(tmp_path / "said")],
        code=tmp_path,
        environment=os.environ | hostile,
    )
    assert code == 0
    found, path = (tmp_path / "said").read_text().splitlines()
    assert Path(found).is_relative_to(sys.prefix)
    assert path == str(tmp_path)


def test_no_start_of_python_in_bash_or_make_goes_without() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "Makefile", "*.sh", "*.sbatch"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    start = re.compile(r"""(\$python"|bin/python["')]*|\bpython3(?= -)|\$host_python")\s+[-"$\w]""")
    found = 0
    for name in listed:
        # Inside the image nothing of the host is left; venv.sh drops all of it itself.
        if name.startswith("containers/stages/") or name == "containers/venv.sh":
            continue
        for line in (CHECKOUT / name).read_text().splitlines():
            if start.search(line) and not line.lstrip().startswith("#"):
                found += 1
                isolated = "isolated.sh" in line or re.search(r"python3?[\"')]* -I", line)
                assert isolated, f"{name}: {line.strip()}"
    assert found > 5
