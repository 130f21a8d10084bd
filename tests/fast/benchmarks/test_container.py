"""benchmarks/container.py: what it compares; the figures themselves are for a quiet machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import container
from tests import waiting
from tests.shared import CHECKOUT


def taking(seconds: list[float]) -> Callable[[], float]:
    rest: Iterator[float] = iter(seconds)
    return lambda: next(rest)


def test_medians_are_compared_and_the_first_turn_does_not_count() -> None:
    host, image = taking([90.0, 2.0, 4.0, 3.0]), taking([99.0, 3.0, 9.0, 6.0])
    found = container.compare(host, image, 3)
    assert (found["host_seconds"], found["image_seconds"]) == (3.0, 6.0)
    assert (found["ratio"], found["difference_seconds"]) == (2.0, 3.0)
    assert found["least_and_most_seconds"] == {"host": [2.0, 4.0], "image": [3.0, 9.0]}


def test_without_an_image_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = waiting.run(
        [sys.executable, CHECKOUT / "benchmarks/container.py", f"--image={tmp_path}/none.sif"],
        cwd=CHECKOUT,
        env=os.environ,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "make build-image VARIANT=cpu" in done.stderr
    assert len(done.stderr.splitlines()) == 1
