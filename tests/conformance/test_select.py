"""Selections, and masks that leave whole tiles out, on every backend: kernels that go by lists against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.analysis.chosen import lowered
from attnopt.options import Options
from attnopt.runtime.chosen import chosen
from attnopt.runtime.dispatch import kernel_used, use
from attnopt.runtime.op import attention
from tests.conformance.judge import LAYOUTS, judge, tensors
from tests.conformance.test_triton import job, verdicts
from tests.specs import SELECTED, Case, Sizes

# Fewer keys than a block, one query, more queries than keys, ragged and whole tiles.
LENGTHS = ((7, 7), (1, 100), (50, 9), (130, 130), (96, 160))
# Masks of positions, of data, and of both.
MASKS = ("prefix_or_window", "blocks", "dilated", "window_per_head", "padding_causal", "documents", "empty_uniform")


def _run(item: Case, rows: int, keys: int, layout: str, dtype: torch.dtype) -> None:
    inputs = tensors(item.spec, 2, rows, keys, layout, dtype, 1.0)
    captures = item.captures(Sizes(2, item.spec.heads.q, rows, keys), torch.Generator().manual_seed(1))
    result = attention(item.spec, *inputs, captures)
    given = [*captures, chosen(item.spec, *inputs[:2], captures)]
    verdict = judge(lowered(item.spec), inputs, given, (), result)
    assert verdict.ok, f"{item} {rows}x{keys} {layout} {dtype}: {verdict}"


@pytest.mark.parametrize("item", SELECTED, ids=str)
@pytest.mark.parametrize("kernel", ["cpp", "reference"])
def test_selections(item: Case, kernel: str, options: Options) -> None:
    with use(replace(options, kernel=kernel)):
        for i, (rows, keys) in enumerate(LENGTHS):
            _run(item, rows, keys, LAYOUTS[i % 4], torch.float32)
        assert kernel_used(item.spec.key) == kernel


def test_selections_in_half_precision(options: Options) -> None:
    with use(replace(options, kernel="cpp")):
        _run(SELECTED[0], 70, 70, "contiguous", torch.bfloat16)
        assert kernel_used(SELECTED[0].spec.key) == "cpp"


def test_triton_kernels_that_go_by_lists() -> None:
    names = [*(c.name for c in SELECTED), *MASKS]
    sizes = ((2, 19, 37), (1, 50, 50), (1, 33, 90), (1, 1, 70))
    jobs = [
        job(name, ("float32", "bfloat16", "float16")[i % 3], sizes[i % 4], ((16, 16, 4, 2), (32, 16, 4, 2))[i % 2],
            kind="listed", layout=LAYOUTS[i % 4])
        for i, name in enumerate(names)
    ]  # fmt: skip
    assert not verdicts(jobs)


def test_a_kernel_that_takes_partial_tiles_for_whole_is_found() -> None:
    good = job("blocks", "float32", (1, 50, 50), kind="listed")
    assert len(verdicts([good, {**good, "change": ["whole, last, True", "whole, last, False"]}])) == 1
