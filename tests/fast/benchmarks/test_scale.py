"""Scale on paper: the sizes of known models, the formulas by hand, and the pages that show them."""

from __future__ import annotations

import re

import pytest

from benchmarks import scale
from tests.shared import CHECKOUT

DOCS = CHECKOUT / "docs"


def test_the_models_have_their_published_sizes() -> None:
    totals = []
    for shape in scale.MODELS.values():
        layer, rest = scale.num_parameters(shape)
        totals.append(layer * shape.num_hidden_layers + rest)
    # The parameters of the files on the hub.
    assert totals == [1_100_048_384, 6_738_415_616, 68_976_648_192]


def test_the_formulas_agree_with_a_calculation_by_hand() -> None:
    shape = scale.MODELS["Llama 2, 7 B"]
    assert scale.memory("ddp", shape, 1) == 16 * 6_738_415_616
    # Four micro batches: their gradients are added up beside the places of the last.
    assert scale.memory("ddp", shape, 64) == 20 * 6_738_415_616
    # 1/256 of 16 bytes, and two layers of 202,383,360 with 262,148,096 outside of them, in bf16.
    part = 16 / 256 * 6_738_415_616
    whole = 2 * (2 * 202_383_360 + 262_148_096)
    assert scale.memory("fsdp2", shape, 256) == pytest.approx(part + whole)
    # 32 micro batches, whose gradients are added up whole: 4 bytes instead of 1/8 of 4.
    assert scale.memory("fsdp2", shape, 8) == (12 / 8 + 4) * 6_738_415_616 + whole
    # 4,194,304 tokens on 64 GPUs are four micro batches of 16,384 on each.
    computes, sends = scale.step("fsdp2", shape, 64, 50e9)
    assert computes == pytest.approx(
        (6 * (6_738_415_616 - 131_072_000 - 4096) + 12 * 32 * 4096 * 4096)
        * (4_194_304 / 64)
        / (989.4e12 * 0.4)
    )
    assert sends == pytest.approx(63 / 64 * (2 + 4 * (2 + 2)) * 6_738_415_616 / 50e9)


def test_the_page_is_what_the_script_prints() -> None:
    assert (DOCS / "scale.md").read_text().endswith(scale.tables())


def test_the_page_of_the_strategies_has_these_bytes() -> None:
    page = (DOCS / "strategies.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    settings = (("fp32", "auto"), ("bf16", "fp32"), ("bf16", "auto"))
    assert rows == [
        (
            name,
            *(
                f"{2 * scale.sent(name, 2, scale.wire(name, *s), micro_batches=1, gloo=True):.0f}"
                for s in settings
            ),
        )
        for name in scale.STRATEGIES
    ]
