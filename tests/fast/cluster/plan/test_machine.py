"""machine.py: the GPUs that torch would see, and ports that nobody listens on."""

from __future__ import annotations

import pytest

from cluster.plan import machine


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("0,1", ["0", "1"]),
        ("3", ["3"]),
        ("", []),
        ("-1", []),
        ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_the_gpus_are_those_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]
) -> None:
    monkeypatch.delenv("SLUICE_DEVICE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == found
    monkeypatch.setenv("SLUICE_DEVICE", "cpu")
    assert machine.gpus() == []
