"""container.py: where the training side runs, what it is shown of the host, and what is refused.

A stand-in for Apptainer notes what it is called with; the real one is in tests/real/containers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

from cluster.plan import container
from cluster.plan.binds import extra_binds, named_paths, own_places
from cluster.plan.image import image_path, lock_sha256
from cluster.plan.runtime import choose_runtime, runtime_values, variants
from runfolder.errors import UserError
from tests import waiting
from tests.checkout import lay_out, rewrite
from tests.shared import CHECKOUT

APPTAINER = """#!/bin/sh
{ for word; do printf '%s\\n' "$word"; done; } > "$NOTES/words"
env > "$NOTES/environment"
cat > "$NOTES/input"
exit "${STATUS:-0}"
"""


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout with bash and locks, without an image and without Apptainer."""
    root = lay_out(tmp_path / "a checkout", "containers/locks/", "slurm/")
    maker = '#!/bin/sh\necho "$@" >> set-up\nexit "${VENV_STATUS:-0}"\n'
    rewrite(root / "containers/venv.sh", maker, 0o755)
    monkeypatch.chdir(root)
    for name in list(os.environ):
        if name.startswith(("SLUICE_", "APPTAINER", "SINGULARITY", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("APPTAINER_PREFIX", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return root


def make_image(variant: str = "cpu") -> Path:
    path = image_path(variant)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    manifest = {"variant": variant, "size_bytes": 1, "lock_sha256": lock_sha256(variant)}
    manifest["sha256"] = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which the stand-in for Apptainer leaves its notes."""
    program = tmp_path / "none/bin/apptainer"
    program.parent.mkdir(parents=True)
    program.write_text(APPTAINER)
    program.chmod(0o755)
    monkeypatch.setenv("NOTES", str(tmp_path))
    return tmp_path


# ---- where ----


def test_without_an_image_it_is_the_host_whose_environment_is_completed(checkout: Path) -> None:
    runtime = choose_runtime("", "", ["cpu", "cuda"])
    assert (runtime.image, str(runtime)) == (None, "on the host, no container")
    values = runtime_values(runtime)
    assert (values["host_python"], values["image"]) == (sys.executable, "")
    assert runtime.record()["runtime"] == "host"
    if (Path(sys.prefix) / ".sluice-stamp").exists():
        assert (checkout / "set-up").read_text() == "--cpu\n"


def test_an_image_is_taken_when_apptainer_is_there_and_else_the_host_with_the_reason(
    apptainer: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image("cuda")
    assert str(choose_runtime("", "", ["cpu", "cuda"])) == "in images/sluice-cuda.sif"
    path = make_image("cpu")
    runtime = choose_runtime("", "", ["cpu", "cuda"])
    assert str(runtime) == "in images/sluice-cpu.sif"
    assert runtime.record()["image"]["path"] == str(path.absolute())
    assert not (checkout / "set-up").exists(), "an image needs no environment on the host"
    assert str(choose_runtime("host", "", ["cpu"])) == "on the host, no container"
    monkeypatch.setenv("APPTAINER_PREFIX", "/nowhere")
    said = str(choose_runtime("", "", ["cpu"]))
    assert said.startswith("on the host, not in images/sluice-cpu.sif: there is no apptainer, ")
    assert said.endswith("containers/install-apptainer.sh installs one")
    with pytest.raises(UserError, match=r"RUNTIME=apptainer: .*install-apptainer.sh installs one"):
        choose_runtime("apptainer", "", ["cpu"])


def test_what_is_asked_for_and_not_there_is_refused_with_the_remedy(apptainer: Path) -> None:
    with pytest.raises(UserError, match=r"no images/sluice-cuda.sif; build it: make build-image V"):
        choose_runtime("apptainer", "", ["cuda"])
    with pytest.raises(UserError, match=r"IMAGE=my.sif: there is no my.sif"):
        choose_runtime("", "my.sif", ["cpu"])
    with pytest.raises(UserError, match=r"RUNTIME=docker: is unknown"):
        choose_runtime("docker", "", ["cpu"])
    make_image().write_bytes(b"y")
    with pytest.raises(UserError, match="its checksum does not match its manifest"):
        choose_runtime("", "", ["cpu"])


@pytest.mark.parametrize(
    ("gpus", "strict", "expected"),
    [
        (False, True, ["cpu", "cuda"]),
        (True, True, ["cuda"]),
        (True, False, ["cuda", "cpu"]),
    ],
)
def test_a_job_on_gpus_is_for_the_cuda_image_alone(
    gpus: bool, strict: bool, expected: list[str]
) -> None:
    assert variants(gpus=gpus, strict=strict) == expected


def test_a_host_environment_that_cannot_be_completed_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".sluice-stamp").write_text("base Linux\ncuda Linux\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    choose_runtime("", "", ["cpu"])
    assert Path("set-up").read_text() == "--cuda\n", "never the CPU build over the CUDA one"
    monkeypatch.setenv("VENV_STATUS", "2")
    with pytest.raises(SystemExit) as ended:
        choose_runtime("", "", ["cpu"])
    assert ended.value.code == 2


# ---- what is shown ----


def call(apptainer: Path, *words: str, online: bool = False, **environment: str) -> list[str]:
    """Return the words of the one call of Apptainer."""
    make_image()
    (Path.cwd() / "data").mkdir(exist_ok=True)
    given = {**os.environ, "SLUICE_DATASETS": str(Path.cwd() / "data"), **environment}
    code = container.call(
        choose_runtime("apptainer", "", ["cpu"]),
        "train.resolve",
        words,
        code=Path.cwd(),
        environment=given,
        writable=[Path.cwd() / "data"],
        online=online,
    )
    assert code == int(environment.get("STATUS", "0"))
    return (apptainer / "words").read_text().splitlines()


def mount(path: Path, mode: str) -> str:
    return f'type=bind,"source={path}","destination={path}"{mode}'


def test_a_command_sees_the_host_at_its_own_paths(apptainer: Path, checkout: Path) -> None:
    mine = apptainer / "text, mine.txt"
    mine.touch()
    words = call(apptainer, "train.tinyllama", "--", f"--data.train={mine}", "--absent", "/absent")
    assert mount(checkout.resolve(), ",ro") in words
    assert mount((checkout / "data").resolve(), "") in words
    assert mount(mine.resolve(), ",ro") in words
    assert not [word for word in words if "/absent" in word and "destination" in word]
    assert not [word for word in words if '"destination=/usr"' in word or "tion=/etc" in word]
    assert words[words.index("--pwd") + 1] == str(checkout)
    inside = words[words.index(str(checkout / "images/sluice-cpu.sif")) + 1 :]
    assert inside[inside.index("python") :] == [
        *("python", "-P", "-m", "train.resolve", "train.tinyllama", "--"),
        *(f"--data.train={mine}", "--absent", "/absent"),
    ]
    assert f"PYTHONPATH={checkout.resolve()}" in inside


def test_only_what_is_listed_of_the_environment_goes_in_and_tokens_only_online(
    apptainer: Path,
) -> None:
    given = {"HF_TOKEN": "a secret", "https_proxy": "p", "NCCL_DEBUG": "INFO", "OTHER": "1"}
    given |= {"APPTAINER_BIND": "/etc", "APPTAINERENV_LEAK": "1", "SINGULARITYENV_LEAK": "1"}
    given |= {"APPTAINER_CACHEDIR": "/scratch/cache"}

    def passed(*, online: bool) -> dict[str, str]:
        words = call(apptainer, "x", online=online, **given)
        assert "a secret" not in " ".join(words), "every user can read a command line"
        lines = (apptainer / "environment").read_text().splitlines()
        seen = dict(line.split("=", 1) for line in lines if line.startswith("APPTAINER"))
        return seen | {k: "" for k in [line.split("=")[0] for line in lines] if "SINGUL" in k}

    offline = passed(online=False)
    assert offline["APPTAINERENV_NCCL_DEBUG"] == "INFO"
    assert offline["APPTAINER_CACHEDIR"] == "/scratch/cache"
    for name in ("HF_TOKEN", "https_proxy", "OTHER", "LEAK"):
        assert f"APPTAINERENV_{name}" not in offline
    assert not {"APPTAINER_BIND", "SINGULARITYENV_LEAK"} & set(offline)
    online = passed(online=True)
    assert online["APPTAINERENV_HF_TOKEN"] == "a secret"
    assert online["APPTAINERENV_https_proxy"] == "p"


def test_an_apptainer_that_cannot_start_is_one_line(apptainer: Path) -> None:
    with pytest.raises(UserError, match=r"apptainer could not start it.*RUNTIME=host"):
        call(apptainer, "x", STATUS="255")
    call(apptainer, "x", STATUS="75")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_command_that_is_interrupted_ends_in_its_own_time_with_its_own_code(when: str) -> None:
    wait = os.waitpid

    def interrupted(*words: int) -> tuple[int, int]:
        """Press Ctrl+C, twice, beside the moment in which the command's end is told."""
        if when == "before":
            os.kill(os.getpid(), signal.SIGINT)
        ended = wait(*words)
        os.kill(os.getpid(), signal.SIGINT)
        return ended

    # As `train.resolve` ends when it has put away what is half done.
    with mock.patch.object(os, "waitpid", interrupted):
        assert container._call(["bash", "-c", "exit 130"], {"PATH": os.environ["PATH"]}) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_standard_input_is_for_a_command_that_reads_it(apptainer: Path, checkout: Path) -> None:
    make_image()
    script = """
import os, sys
from pathlib import Path
from cluster.plan import container
from cluster.plan.runtime import choose_runtime
for reads_input in (False, True):
    container.call(choose_runtime("apptainer", "", ["cpu"]), "x", [], code=Path.cwd(),
                   environment=os.environ, reads_input=reads_input)
    print(Path(os.environ["NOTES"], "input").read_text())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="two\nlines",
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "SLUICE_DATASETS": "data"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\ntwo\nlines\n"


def test_parents_come_before_what_is_written_below_them(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    root = tmp_path.resolve()
    binds = own_places([root, root / "a"], [tmp_path / "link/b"])
    ours = [line for line in binds if line.startswith(str(root))]
    assert ours == [f"{root}:{root}:ro", f"{root}/a/b:{root}/a/b:rw"]
    elsewhere = [line for line in binds if line not in ours]
    assert {line.rpartition(":")[2] for line in elsewhere} <= {"ro"}
    targets = {line.split(":")[1] for line in elsewhere}
    assert not targets & {"/", "/usr", "/etc", "/opt", "/var", "/tmp", "/proc", "/dev"}


@pytest.mark.parametrize("path", ["/", "/usr/lib", "/opt", "/opt/sluice", "/opt/sluice/main"])
def test_a_place_that_would_hide_the_image_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="conflicts with the image's own"):
        own_places([Path(path)], [])


def test_a_path_with_a_colon_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    with pytest.raises(UserError, match="a path with a colon cannot be bound"):
        own_places([tmp_path / "a:b"], [])


def test_the_paths_of_a_command_are_found_in_words_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "d"):
        Path(name).touch()
    settings = {"data": {"train": "~/b", "config": "no such"}, "name": str(tmp_path / "c")}
    Path("s.yaml").write_text(yaml.safe_dump(settings))
    Path("broken.yaml").write_text("a: [")
    words = [
        "--prompt=a",
        "--x=a",
        "--config",
        "s.yaml",
        "~/d",
        "--flag",
        "x" * 5000,
        "",
        "\0",
        "broken.yaml",
    ]
    assert named_paths(words) == [
        *(Path("a"), Path("s.yaml"), tmp_path / "b", tmp_path / "c", tmp_path / "d"),
        Path("broken.yaml"),
    ]


def test_a_model_of_the_users_own_is_bound_with_what_its_links_lead_to(tmp_path: Path) -> None:
    datasets, cache = tmp_path / "datasets", tmp_path / "hub/models--x"
    model = cache / "snapshots/1"
    for folder in (datasets / "packed/1", cache / "blobs", model, tmp_path / "far/2"):
        folder.mkdir(parents=True)
    (cache / "blobs/abc").touch()
    (model / "config.json").symlink_to("../../blobs/abc")
    (datasets / "packed/2").symlink_to(tmp_path / "far/2")
    staged = {"model": str(model), "tokenizer": None, "train": "packed/1", "validation": "packed/2"}
    assert extra_binds({"staged": staged}, datasets) == [
        f"{path}:{path}:ro" for path in (tmp_path / "far/2", cache / "blobs/abc", model)
    ]
    assert extra_binds({"staged": None}, datasets) == []
    with pytest.raises(UserError, match="conflicts with /datasets in the container of a run"):
        extra_binds({"staged": {"model": "/datasets/llama"}}, datasets)


# ---- the command ----


def test_the_command_names_the_run_and_the_place(checkout: Path, apptainer: Path) -> None:
    make_image()
    run = checkout / "runs/tinyllama/20260101-000000-abcdef"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    (checkout / "out").mkdir()
    done = waiting.run(
        [
            *(
                sys.executable,
                "-m",
                "cluster",
                "train-module",
                "train.export",
                "--run=tinyllama",
                "--",
            ),
            *("--dtype", "bfloat16", "--output", "out/new/model"),
        ],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert (done.returncode, done.stderr) == (0, "note: in images/sluice-cpu.sif\n")
    words = (apptainer / "words").read_text().splitlines()
    assert words[-6:] == ["train.export", str(run), "--dtype", "bfloat16", "--output", words[-1]]
    assert mount(run, "") in words
    assert mount(checkout / "out", "") in words


def test_the_command_takes_a_models_folder_instead(checkout: Path, apptainer: Path) -> None:
    make_image()
    (apptainer / "a model").mkdir()
    command = [sys.executable, "-m", "cluster", "train-module", "train.chat"]
    given = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HOME": str(apptainer)}
    words = ["--model=~/a model", "--", "--system=/usr"]
    done = waiting.run([*command, *words], cwd=checkout, env=given)
    assert (done.returncode, done.stderr) == (0, "note: in images/sluice-cpu.sif\n")
    passed = (apptainer / "words").read_text().splitlines()
    assert passed[-2:] == [str(apptainer / "a model"), "--system=/usr"]
    assert mount(apptainer / "a model", ",ro") in passed
    for more, line in (
        (["--model=~/absent"], "error: MODEL=~/absent: there is no such folder\n"),
        (["--model=~", "--run=x"], "error: RUN: give it or MODEL, not both\n"),
    ):
        done = waiting.run([*command, *more], cwd=checkout, env=given)
        assert (done.returncode, done.stderr) == (2, line)
