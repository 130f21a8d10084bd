"""Does it fit: what is said about the memory of a job, and which change is found first."""

from __future__ import annotations

from pathlib import Path

import pytest

from train import fit, resolve
from train.fit import Choice, changes

SETTINGS = [
    *("--model.preset", "tiny", "--data.sequence_length", "64", "--precision", "bf16"),
    *("--data.train", "train/samples/train.txt"),
    *("--data.validation", "train/samples/validation.txt"),
    *("--batch.global_batch_size", "64"),
]


def said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, gib: float, accel: str, size: int
) -> list[str]:
    """Return what is said of a job of some processes, each of which has so much memory."""
    monkeypatch.setenv("SLUICE_ACCEL", accel)
    monkeypatch.setenv("SLUICE_WORLD_SIZE", str(size))
    monkeypatch.setenv("SLUICE_DEVICE", "cuda")
    config, lines = folder / "config.yaml", folder / "said"
    assert resolve.main(["train.tinyllama", f"--resolved={config}", "--", *SETTINGS]) == 0
    words = [f"--config={config}", f"--gib={gib}", f"--said={lines}"]
    assert fit.main(["train.tinyllama", *words]) == 0
    return lines.read_text().splitlines()


@pytest.mark.parametrize(
    ("mib", "accel", "expected"),
    [
        (0, "ddp", ["whether they fit is unknown"]),
        (64, "ddp", ["of 64 MiB: fits"]),
        (8, "ddp", ["of 8 MiB: does not fit", "it fits with --batch.micro_batch_size 4: "]),
        (3, "ddp", ["of 3 MiB: does not fit", "it fits with ACCEL=fsdp2"]),
        (0.5, "ddp", ["of 0 MiB: does not fit", "no strategy, micro batch or number of nodes"]),
        (64, "zero3_offload", ["not predicted for zero3_offload"]),
    ],
)
def test_a_job_fits_or_the_smallest_change_that_helps_is_named(
    mib: float,
    accel: str,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: None,
) -> None:
    lines = said(tmp_path, monkeypatch, gib=mib / 1024, accel=accel, size=2)
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert words in line


def test_the_changes_come_in_the_order_of_what_they_cost() -> None:
    chosen = Choice("zero1", 2, 4, gradient_checkpointing=False)
    words = [words for _, words in changes(chosen, global_batch_size=16)]
    assert [word.partition(" ")[0] for word in words] == [
        "--batch.micro_batch_size",
        "--batch.micro_batch_size",
        "--model.gradient_checkpointing",
        "--batch.micro_batch_size",
        "ACCEL=zero2",
        "ACCEL=zero2",
        "ACCEL=fsdp2",
        "ACCEL=fsdp2",
        "ACCEL=zero3",
        "ACCEL=zero3",
        *("2", "2", "4", "4", "8", "8"),
    ]
    assert [change.world_size for change, _ in changes(chosen, 16)][-6:] == [4, 4, 8, 8, 16, 16]
    # One process has nobody to share with.
    alone = Choice("ddp", 1, 1, gradient_checkpointing=True)
    assert [change.strategy for change, _ in changes(alone, 2)] == ["ddp", "fsdp2", "zero3"]
