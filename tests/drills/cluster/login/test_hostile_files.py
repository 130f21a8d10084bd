"""Many files that nobody would write: read as OpenSSH reads them, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.fast.cluster.login import test_known_hosts, test_ssh_config

pytestmark = pytest.mark.needs("sshd")
Try = Callable[..., None]


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Try:
    """Return a function that runs a check on many examples, of the seed that is printed."""
    seed = request.config.getoption("seed")
    if seed is None:
        seed = random.randrange(1 << 30)
    print(f"seed {seed}")

    def run(check: Callable[..., None], *strategies: st.SearchStrategy[object]) -> None:
        made = hypothesis.given(*strategies)(check)
        made = hypothesis.settings.get_profile("drills")(made)
        hypothesis.seed(seed)(made)()

    return run


def test_an_ssh_config_is_read_as_ssh_reads_it(many: Try, tmp_path: Path) -> None:
    def check(lines: list[str]) -> None:
        test_ssh_config.compare(tmp_path, lines)

    many(check, st.lists(test_ssh_config.LINE, min_size=1, max_size=4))


@pytest.mark.parametrize("name", ["farm", "[farm]:2222"])
def test_no_key_is_found_that_ssh_keygen_does_not_find(
    many: Try, tmp_path: Path, name: str
) -> None:
    def check(lines: list[str]) -> None:
        test_known_hosts.compare(tmp_path, lines, name)

    many(check, st.lists(test_known_hosts.LINE, min_size=1, max_size=20))
