"""job.py: what a file of configs/jobs may say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan.job import Resources, load_job, strategy_file
from runfolder.errors import UserError
from tests.shared import CHECKOUT


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout with one script, and this test in it."""
    for folder in ("configs/jobs", "configs/accelerate", "train/labs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "train/labs/rag.py").touch()
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
    assert (CHECKOUT / load_job(path.stem).script).is_file()


def test_a_job_has_a_module_and_resources_that_it_need_not_say(checkout: Path) -> None:
    write("script: train/labs/rag.py\narguments: {anything: 1}")
    found = load_job("rag")
    assert found.module == "train.labs.rag"
    assert found.resources == Resources()
    write("script: train/labs/rag.py\nresources: {nodes: 4, time: 1-02:00:00}")
    assert load_job("rag").resources == Resources(nodes=4, time="1-02:00:00")


@pytest.mark.parametrize("name", ["rga", "configs/jobs/rag.yaml", "../jobs/rag", ""])
def test_a_job_that_does_not_exist_is_refused_with_one_that_does(checkout: Path, name: str) -> None:
    write("script: train/labs/rag.py")
    with pytest.raises(UserError, match=f"^JOB={name}: there is no .*'?rag'?"):
        load_job(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML: "),
        (b"\xff\xfe", "is not valid YAML: "),
        ("", "is not a mapping with script, resources and arguments"),
        ("- script", "is not a mapping"),
        ("scirpt: x", "'scirpt' is not a setting; did you mean 'script'?"),
        ("resources: {}", "script: 'None' is not a path such as"),
        ("script: 3", "script: '3' is not a path such as"),
        ("script: ../train/labs/rag.py", "script: '../train/labs/rag.py' is not a path such as"),
        ("script: train/labs/rga.py", "script: train/labs/rga.py does not exist"),
    ],
)
def test_a_file_that_is_no_job_is_refused(checkout: Path, text: str | bytes, said: str) -> None:
    assert refusal(text).startswith(said)


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
