"""Guards: what is not finite ends the run and says where; a lost peer is one line."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from runfolder.errors import UserError
from train.engine import guard
from train.engine.errors import RunFailed


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that sets what the other rank says; this one is rank 1."""

    def other_says(text: str) -> None:
        monkeypatch.setattr(guard, "rank", lambda: 1)
        monkeypatch.setattr(guard, "gather_strings", lambda mine: [text, mine])

    return other_says


def test_finite_numbers_pass_without_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(guard, "gather_strings")
    guard.check_loss(5.0, 10.0, step=3, positions=[[0]])
    guard.check_gradient(0.0, step=3, positions=[[0]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_step_rank_and_positions(value: float) -> None:
    with pytest.raises(RunFailed) as error:
        guard.check_loss(value, value, step=7, positions=[[8, 9], [40, 41]])
    assert "the loss of step 7 is not finite (rank 0, positions 8 to 41);" in str(error.value)
    assert "the last checkpoint is from before it" in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_ranks_whose_loss_is_not_finite_are_named(
    two_ranks: Callable[[str], None],
) -> None:
    two_ranks("")
    with pytest.raises(RunFailed, match=r"not finite \(rank 1, positions 4 to 5\);"):
        guard.check_loss(math.nan, math.nan, step=7, positions=[[4], [5]])
    two_ranks("rank 0, positions 0 to 3")
    with pytest.raises(RunFailed, match=r"not finite \(rank 0, positions 0 to 3\);"):
        guard.check_loss(2.0, math.nan, step=7, positions=[[4], [5]])
    with pytest.raises(RunFailed, match=r"\(rank 0, positions 0 to 3; rank 1, positions 4 to 5\)"):
        guard.check_loss(math.inf, math.inf, step=7, positions=[[4], [5]])


def test_a_sum_that_overflows_where_no_rank_did_says_so(two_ranks: Callable[[str], None]) -> None:
    two_ranks("")
    with pytest.raises(RunFailed, match=r"step 7 is not finite \(the sum over ranks\);"):
        guard.check_loss(1e308, math.inf, step=7, positions=[[4], [5]])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_step_and_every_ranks_positions(
    two_ranks: Callable[[str], None], value: float
) -> None:
    two_ranks("rank 0, positions 0 to 3")
    with pytest.raises(RunFailed) as error:
        guard.check_gradient(value, step=7, positions=[[4], [5]])
    assert (
        "the gradient of step 7 is not finite "
        "(rank 0, positions 0 to 3; rank 1, positions 4 to 5);" in str(error.value)
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore",
        "NCCL error in: ../ProcessGroupNCCL.cpp:3690, remote process exited\nmore",
        "Connection reset by peer\nmore",
    ],
)
def test_a_lost_peer_is_one_line(text: str) -> None:
    with pytest.raises(RunFailed) as error, guard.in_one_line():
        raise RuntimeError(text)
    reason = text.splitlines()[0]
    assert str(error.value) == f"rank 0: lost contact with another process ({reason})"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RunFailed("the loss of step 1 is not finite (gloo)"),
        UserError("data.train: /gloo/text.txt does not exist"),
        ValueError("gloo"),
    ],
)
def test_another_error_passes_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, guard.in_one_line():
        raise error
    assert passed.value is error


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:126] data. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 8192 bytes. Error code 12 (Cannot allocate memory)\nframe #0: ...",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\n...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_is_used_up_is_one_line_with_what_helps(text: str) -> None:
    with pytest.raises(RunFailed) as error, guard.in_one_line():
        raise RuntimeError(text)
    assert str(error.value).startswith(f"rank 0: out of memory ({text.splitlines()[0]}); let it")


def test_pythons_own_error_is_told_as_that_too() -> None:
    said = r"^rank 0: out of memory \(MemoryError\); "
    with pytest.raises(RunFailed, match=said), guard.in_one_line():
        raise MemoryError
