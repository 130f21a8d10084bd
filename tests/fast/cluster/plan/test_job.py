"""job.py: what a file of configs/jobs may say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan.job import Resources, load_job, strategy_file
from cluster.plan.program import MODULE, Program
from runfolder.errors import UserError
from tests.shared import CHECKOUT


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout with one script, and this test in it."""
    for folder in ("configs/jobs", "configs/accelerate", "train/labs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "train/labs/rag.py").write_text("SCRIPT = 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str | bytes) -> None:
    Path("configs/jobs/rag.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def refusal(text: str | bytes) -> str:
    write(text)
    with pytest.raises(UserError) as raised:
        load_job("rag")
    prefix, _, said = str(raised.value).partition(": ")
    assert prefix == "configs/jobs/rag.yaml"
    return said


@pytest.mark.parametrize("path", sorted((CHECKOUT / "configs/jobs").glob("*.yaml")), ids=str)
def test_every_job_of_the_checkout_is_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    found = load_job(path.stem)
    assert (CHECKOUT / found.module.replace(".", "/")).with_suffix(".py").is_file()
    assert found.program is None


def test_a_job_has_a_module_and_resources_that_it_need_not_say(checkout: Path) -> None:
    write("script: train/labs/rag.py\narguments: {anything: 1}")
    found = load_job("rag")
    assert found.module == "train.labs.rag"
    assert found.resources == Resources()
    write("script: train/labs/rag.py\nresources: {nodes: 4, time: 1-02:00:00}")
    assert load_job("rag").resources == Resources(nodes=4, time="1-02:00:00")


@pytest.mark.parametrize("name", ["rga", "elsewhere/rga.yaml", "~/rga.yml", ""])
def test_a_job_that_does_not_exist_is_refused_with_one_that_does(checkout: Path, name: str) -> None:
    write("script: train/labs/rag.py")
    with pytest.raises(UserError, match=f"^JOB={name}: there is no .*'?rag'?"):
        load_job(name)


@pytest.mark.parametrize("name", ["../jobs/rag", "configs/jobs", "rag.py/x"])
def test_a_path_that_is_no_job_file_is_refused(checkout: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"^JOB={name}: is neither the name of a job"):
        load_job(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML: "),
        (b"\xff\xfe", "is not valid YAML: "),
        ("", "is not a mapping with script, resources and arguments"),
        ("- script", "is not a mapping"),
        ("scirpt: x", "'scirpt' is not a setting; did you mean 'script'?"),
        ("resume: true", "'resume' is not a setting; did you mean 'resume_arguments'?"),
        (
            "module: a\nresources: {gpus: 2}",
            "'resources.gpus' is not a setting; did you mean 'gpus_per_node'?",
        ),
        ("resources: {}", "give one of script, module or command; it has none of them"),
        ("script: a.py\nmodule: a", "give one of script, module or command; it has both"),
        ("script: 3", "script: 3 is not a name"),
        ("script: train", "script: train is a folder; name the file that is started"),
        ("script: README", "script: README is not a .py file"),
        ("module: a b", "module: 'a b' is not the name of a module"),
        ("command: rm -rf x", "command: 'rm -rf x' is not the name of a command"),
        ("module: a\narguments: 3", "arguments: 3 is neither a list of words nor a mapping"),
        ("module: a\narguments: [[1]]", "arguments: [1] is not a word"),
        ("module: a\nsignal: KILL", "signal: 'KILL' is not one of USR1, TERM, none"),
        ("module: a\ncheckpoints: ../x", "checkpoints: '../x' is not a path below the run"),
        ("module: a\ncheckpoints: /x", "checkpoints: '/x' is not a path below the run"),
        ("module: a\nindependent_ranks: 1", "independent_ranks: 1 is not true or false"),
        ("module: a\nenvironment: [x]", "'environment' is not a mapping"),
        ("module: a\nenvironment: {SLUICE_RUNS: x}", "environment.SLUICE_RUNS: is reserved"),
        ("module: a\nenvironment: {A: 1}", "environment.A: 1 must be a string in quotes"),
        ("module: a\nmail: [x]", "mail: ['x'] is not an address, such as"),
        ("module: a\nmail: 'ada@x --wrap'", "mail: 'ada@x --wrap' is not an address"),
        (
            "module: a\nmail: {user: a, typ: END}",
            "'mail.typ' is not a setting",
        ),
        (
            "module: a\nmail: {user: a, type: [ENDS]}",
            "mail.type: 'ENDS' is not a type of mail",
        ),
        ("module: a\nmail: {user: a, type: 3}", "mail.type: 3 is not a list such as"),
        ("module: a\nafter: [x]", "after: ['x'] is not a run"),
        ("script: train/labs/rag.py\nsignal: TERM", "signal: is for a script that is not"),
        ("script: train/labs/rga.py", "script: train/labs/rga.py does not exist; check"),
        (
            "script: rag.py",
            "script: rag.py does not exist; names in a job file of the checkout are seen from it: "
            "configs/jobs/rag.py",
        ),
    ],
)
def test_a_file_that_is_no_job_is_refused(checkout: Path, text: str | bytes, said: str) -> None:
    (checkout / "README").touch()
    (checkout / "configs/jobs/rag.py").touch()
    assert refusal(text).startswith(said)


# ---- a script that is not ours ----


def test_a_script_beside_a_job_file_anywhere_is_a_program_with_its_folder(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("mine")
    (elsewhere / "fit.py").write_text("print(1)\n")
    (elsewhere / "small.yaml").write_text(
        "script: fit.py\n"
        "arguments: {lr: 1.0e-3, 'a.b': [1, 2], deep: {x: true}, flag: null}\n"
        "resume_arguments: [--resume, latest]\n"
        "checkpoints: out\nsignal: TERM\nenvironment: {A: '1'}\n"
    )
    found = load_job(str(elsewhere / "small.yaml"))
    assert (found.name, found.module, found.script_folder) == ("small", MODULE, elsewhere)
    assert found.environment == {"A": "1"}
    assert found.program == Program(
        kind="script",
        name="script/fit.py",
        arguments=["--lr", "0.001", "--a.b", "1", "2", "--deep.x", "true", "--flag"],
        resume_arguments=["--resume", "latest"],
        checkpoints="out",
        signal="TERM",
    )


def test_a_project_is_copied_from_the_folder_that_the_job_names(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = tmp_path_factory.mktemp("project")
    (project / "scripts").mkdir()
    (project / "scripts/fit.py").write_text("import lib\n")
    (project / "a.yaml").write_text("script: scripts/fit.py\nfolder: .\n")
    found = load_job(str(project / "a.yaml"))
    assert found.program is not None
    assert (found.script_folder, found.program.name) == (project, "script/scripts/fit.py")
    (project / "b.yaml").write_text("module: lib.train\nfolder: .\n")
    assert load_job(str(project / "b.yaml")).script_folder == project
    (project / "c.yaml").write_text("script: scripts/fit.py\nfolder: nowhere\n")
    with pytest.raises(UserError, match=r"folder: 'nowhere' is not a folder"):
        load_job(str(project / "c.yaml"))
    (project / "other").mkdir()
    (project / "d.yaml").write_text("script: scripts/fit.py\nfolder: other\n")
    with pytest.raises(UserError, match=r"scripts/fit\.py is not in the folder"):
        load_job(str(project / "d.yaml"))


def test_a_script_of_the_checkout_without_script_is_a_program_in_its_place(checkout: Path) -> None:
    (checkout / "mine").mkdir()
    (checkout / "mine/fit.py").write_text("SCRIPT: int\n")
    write("script: mine/fit.py\narguments: ['--x=1', two words]")
    found = load_job("rag")
    assert found.script_folder is None
    assert found.program == Program(
        kind="script", name="mine/fit.py", arguments=["--x=1", "two words"]
    )


@pytest.mark.parametrize("kind", ["module", "command"])
def test_a_module_or_command_needs_no_file(checkout: Path, kind: str) -> None:
    write(f"{kind}: axolotl.cli.train")
    found = load_job("rag").program
    assert found is not None
    assert (found.kind, found.name) == (kind, "axolotl.cli.train")


def test_mail_becomes_options_of_sbatch(checkout: Path) -> None:
    write("script: train/labs/rag.py\nmail: ada@example.edu\nafter: tinyllama")
    found = load_job("rag")
    assert found.mail == ["--mail-user=ada@example.edu", "--mail-type=END,FAIL"]
    assert found.after == "tinyllama"
    write("script: train/labs/rag.py\nmail: {user: ada, type: ALL}")
    assert load_job("rag").mail == ["--mail-user=ada", "--mail-type=ALL"]


def test_a_script_that_is_not_python_is_refused_with_its_line(checkout: Path) -> None:
    Path("bad.py").write_text("x = 1\ndef f(:\n")
    write("script: bad.py")
    with pytest.raises(UserError, match=r"^bad\.py:2: is not Python: .*rag\.yaml: script names it"):
        load_job("rag")


def test_a_copy_of_one_of_ours_outside_the_checkout_is_refused(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("mine") / "mine.py"
    copy.write_text("SCRIPT = 1\n")
    write(f"script: {copy}")
    with pytest.raises(UserError, match=r"is not in this checkout; put it below train/"):
        load_job("rag")


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ("3", "'resources' is not a mapping"),
        ("{node: 1}", "'resources.node' is not a setting; did you mean 'nodes'?"),
        ("{nodes: 0}", "resources.nodes: '0' must be a whole number, at least 1"),
        ("{nodes: true}", "resources.nodes: 'True' must be a whole number, at least 1"),
        ("{gpus_per_node: -1}", "resources.gpus_per_node: '-1' must be a whole number, at least 0"),
        ("{max_restarts: 1.5}", "resources.max_restarts: '1.5' must be a whole number, at least 0"),
        ("{time: soon}", "resources.time: 'soon' is not a time such as"),
        # YAML 1.1 reads this as a number of seconds.
        ("{time: 12:00:00}", "resources.time: '43200' is not a time such as \"04:00:00\" (in q"),
    ],
)
def test_wrong_resources_are_refused(checkout: Path, resources: str, said: str) -> None:
    assert refusal(f"script: train/labs/rag.py\nresources: {resources}").startswith(said)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["script", "resources", "arguments", "nodes", "time", "x"]), inner
        )
    ),
    max_leaves=8,
)


@given(json_like)
def test_any_yaml_is_a_job_or_one_mistake(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    home = tmp_path_factory.getbasetemp()
    (home / "configs/jobs").mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write(yaml.safe_dump(content))
        with pytest.raises(UserError, match=r"^configs/jobs/rag\.yaml: "):
            load_job("rag")


def test_a_strategy_is_a_file_of_configs_accelerate(checkout: Path) -> None:
    (checkout / "configs/accelerate/zero2.yaml").touch()
    assert strategy_file("zero2") == Path("configs/accelerate/zero2.yaml")
    with pytest.raises(UserError, match=r"^ACCEL=zero_2: there is no .* did you mean 'zero2'"):
        strategy_file("zero_2")
