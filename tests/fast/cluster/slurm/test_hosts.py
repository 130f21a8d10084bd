"""hosts.py: lists of nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.slurm import hosts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("(null)", []),
        ("login", ["login"]),
        ("node[1-3,7],gpu[08-10]", ["node1", "node2", "node3", "node7", "gpu08", "gpu09", "gpu10"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("node[3-1]", []),
    ],
)
def test_a_list_is_expanded(text: str, names: list[str]) -> None:
    assert hosts.expand(text) == names


def test_a_list_that_would_fill_the_memory_is_cut() -> None:
    assert len(hosts.expand("n[1-999999999]")) == hosts.MOST
    assert len(hosts.expand("n[1-99999]x[1-99999]")) == hosts.MOST


def test_names_are_compact() -> None:
    names = ["node3", "node1", "node2", "node10", "gpu01", "gpu02", "login"]
    assert hosts.compact(names) == "gpu[01-02],login,node[1-3,10]"
    assert hosts.compact(["node7"]) == "node7"


@given(st.sets(st.integers(0, 300), max_size=40), st.sampled_from(["node", "a-b", "r1n"]))
def test_compact_is_the_same_nodes(numbers: set[int], stem: str) -> None:
    names = {f"{stem}{number}" for number in numbers}
    assert set(hosts.expand(hosts.compact(names))) == names


@given(st.text(alphabet="n1[]-,0 9(", max_size=30))
def test_anything_is_a_list(text: str) -> None:
    hosts.compact(hosts.expand(text))
