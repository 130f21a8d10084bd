"""Metrics: no guess at a device, no step twice, the same figures in both records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.engine import metrics
from train.engine.metrics import Metrics, StepTimer, peak_flops

# ---- peak of a device ----


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100X", None),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A16", None),
        ("NVIDIA A30", 165e12),
        ("NVIDIA A30X", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA L40G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", None),
        ("NVIDIA", None),
        ("", None),
    ],
)
def test_the_peak_is_that_of_this_very_device_or_none(device_name: str, peak: float | None) -> None:
    assert peak_flops(device_name) == peak


@pytest.mark.parametrize(
    "device_name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"]
)
def test_a_slice_of_a_gpu_has_not_the_peak_of_the_gpu(device_name: str) -> None:
    assert peak_flops(device_name) is None


# ---- speed ----


def test_the_timer_leaves_out_the_first_steps() -> None:
    timer = StepTimer(warmup_steps=2)
    timer.add(tokens=100, seconds=50.0, data_seconds=25.0)
    timer.add(tokens=100, seconds=40.0, data_seconds=20.0)
    assert timer.take() == {}
    assert timer.summary() == {}
    timer.add(tokens=100, seconds=2.0, data_seconds=0.5)
    timer.add(tokens=300, seconds=2.0, data_seconds=0.5)
    assert timer.take() == {"tokens_per_second": 100.0, "data_wait": 0.25}


def test_the_timer_reports_each_step_once_and_sums_up_all() -> None:
    timer = StepTimer(warmup_steps=0)
    for rate in range(1, 12):
        timer.add(tokens=10.0 * rate, seconds=1.0, data_seconds=0.0)
        assert timer.take()["tokens_per_second"] == 10.0 * rate
        assert timer.take() == {}
    assert timer.summary() == {
        "tokens_per_second_p10": 20.0,
        "tokens_per_second_median": 60.0,
        "tokens_per_second_p90": 100.0,
    }


# ---- the records ----


def line(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 6.0 - step / 3, "lr": 1e-3 / (step + 1), "tokens": step, **more}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Return each curve that TensorBoard shows: its value at each step."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        found[tag] = {scalar.step: scalar.value for scalar in scalars}
        assert len(found[tag]) == len(scalars), f"{tag}: a step is there twice"
    return found


def test_a_resumed_run_has_every_step_once_in_both_records_and_the_same_figures(
    tmp_path: Path,
) -> None:
    first = Metrics(tmp_path, max_steps=6, resume_step=0)
    for step in range(5):
        first.write(line(step, validation_loss=5.5) if step % 2 == 0 else line(step))
    first.close()
    # Killed after step 4; its last checkpoint is of step 3, which is written again.
    second = Metrics(tmp_path, max_steps=6, resume_step=3)
    for step in range(3, 7):
        second.write(line(step, grad_norm=0.25))
    second.close()

    lines = read_lines(tmp_path)
    assert [entry["step"] for entry in lines] == list(range(7))
    assert lines[2] == line(2, validation_loss=5.5)
    assert lines[4] == line(4, grad_norm=0.25)
    events = read_events(tmp_path)
    assert set(events) == {"loss", "lr", "validation_loss", "grad_norm"}
    for tag, curve in events.items():
        expected = {entry["step"]: entry[tag] for entry in lines if tag in entry}
        assert curve == pytest.approx(expected, rel=1e-6), tag


def test_a_line_that_was_being_written_when_the_run_was_killed_is_dropped(tmp_path: Path) -> None:
    whole = "".join(json.dumps(line(step)) + "\n" for step in range(4))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    record = Metrics(tmp_path, max_steps=9, resume_step=7)
    record.write(line(7))
    record.close()
    assert read_lines(tmp_path) == [line(step) for step in (0, 1, 2, 3, 7)]


def test_a_last_line_that_only_lacks_its_end_is_dropped_too(tmp_path: Path) -> None:
    # Cut between the brace and the end of the line; appending would join two lines.
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(0)) + "\n" + json.dumps(line(1)))
    metrics._drop_from(tmp_path / "metrics.jsonl", 5)
    assert read_lines(tmp_path) == [line(0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_over_without_a_checkpoint_starts_its_record_over(
    tmp_path: Path,
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(0)) + "\n")
    Metrics(tmp_path, max_steps=9, resume_step=0).close()
    assert read_lines(tmp_path) == []


def test_a_line_is_in_the_file_as_soon_as_it_is_written_and_shown_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Metrics(tmp_path, max_steps=9, resume_step=0)
    record.write(line(3, tokens_per_second=12345.678, validation_perplexity=math.inf))
    assert [entry["step"] for entry in read_lines(tmp_path)] == [3]
    record.close()
    assert capsys.readouterr().out == (
        "step      3  loss 5  validation_perplexity inf  lr 0.00025  tokens_per_second 12,346\n"
    )
