"""Masks on every way they are run: derived words, C++ tile ranges, and what a fully masked row gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import attnopt
from attnopt import expr as ex
from attnopt.analysis.grid import Grid
from attnopt.analysis.masks import derive
from attnopt.expr import FloorDiv, Mod, k, n_k, n_q, q
from attnopt.options import Options
from attnopt.runtime.dispatch import kernel_used
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.op import attention
from attnopt.spec import AttentionSpec, EmptyRow, Heads
from tests.analysis.keeps import KEEPS, grids
from tests.conformance.judge import judge, tensors


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(KEEPS, grids())
def test_words_are_what_the_reference_evaluates(keep: sp.Basic, grid: Grid) -> None:
    keep = ex.canon(keep)
    axes = {c: torch.arange(n) for c, n in zip(ex.COORDINATES, grid.shape, strict=True)}
    sizes = {**dict(zip(ex.SIZES, grid.shape, strict=True)), ex.scalar("start"): grid.scalars["start"]}
    captures = {name: torch.from_numpy(a) for name, a in grid.captures.items()}
    dense = evaluate(keep, Scope(axes, sizes, captures, None, torch.float64)).expand(grid.shape)
    mask = derive(keep)
    np.testing.assert_array_equal(mask.dense(grid), dense.numpy(), err_msg=f"{keep} is not {mask}")


_ROWS = sp.Abs(FloorDiv(k, 16) - FloorDiv(q, 16)) <= 1
RANGES = (
    ("chunked", sp.And(k <= q, sp.Eq(FloorDiv(k, 48), FloorDiv(q, 48)))),
    ("blocks", sp.Eq(FloorDiv(k, 24), FloorDiv(q, 24))),
    ("block-causal", FloorDiv(k, 24) <= FloorDiv(q, 24)),
    ("coarse queries", k <= FloorDiv(q, 2)),
    ("neighbourhood", sp.And(_ROWS, sp.Abs(Mod(k, 16) - Mod(q, 16)) <= 2)),
    ("dilated", sp.And(k <= q, q - k < 90, sp.Eq(Mod(q - k, 3), 0))),
    ("clamped", sp.Abs(k - ex.Minimum(ex.Maximum(q, 9), n_k - 10)) <= 9),
    ("jagged", k <= q + Mod(q, 7)),
    ("end of the block", k <= q - Mod(q, 40) + 39),
    ("first keys and window", sp.And(k <= q + n_k - n_q, sp.Or(k < 4, q + n_k - n_q - k < 30))),
)


@pytest.mark.parametrize(("name", "keep"), RANGES, ids=[r[0] for r in RANGES])
def test_tile_ranges_of_the_kernel(name: str, keep: sp.Basic) -> None:
    spec = AttentionSpec(Heads(1, 1, 1, 16, 16), keep=keep, empty_row=EmptyRow.ZERO).canonical()
    for n_queries, n_keys in ((1, 1), (200, 129), (65, 200)):
        inputs = tensors(spec, 1, n_queries, n_keys, "contiguous", torch.float32, 1.0)
        verdict = judge(spec, inputs, [], [], attention(spec, *inputs, [], []))
        assert verdict.ok, f"{name} {n_queries} {n_keys}: {verdict}"
    assert kernel_used(spec.key) == "cpp"


# --- fully masked rows -----------------------------------------------------------------------------

Q, K = 5, 6
_LATER = torch.ones(Q, K, dtype=torch.bool).triu(1)
_FAR = torch.ones(Q, K, dtype=torch.bool).triu(3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _mask() -> Tensor:
    """True is kept. Row 1 of the first entry keeps nothing, row 4 of the second neither."""
    keep = torch.ones(2, 1, Q, K, dtype=torch.bool)
    keep[0, :, 1], keep[1, :, 4], keep[1, :, :, 3:] = False, False, False
    return keep


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(8)


def _min(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def _fill(keep: Tensor, value: float, like: Tensor) -> Tensor:
    return torch.where(keep, torch.zeros((), dtype=like.dtype), torch.full((), value, dtype=like.dtype))


def _weigh(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def _two_added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + _fill(m, _min(q), q) + _fill(~_LATER, _min(q), q), v)


def _upcast(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = _scores(q, k).float() + _fill(m, torch.finfo(torch.float32).min, torch.zeros(()))
    return scores.softmax(-1).to(v.dtype) @ v


def _lower_right(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    short = k[:, :, :3], v[:, :, :3]
    keep = torch.arange(3) <= torch.arange(Q)[:, None] + 3 - Q
    return F.scaled_dot_product_attention(q, *short, keep)


INF = float("-inf")
_FULL = ((0, 1), (1, 4))


@dataclass(frozen=True)
class Spelling:
    """One way to mask. `gives`: zero, nan, uniform or subset (of the keys that `seen` holds) in the rows `bare`."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gives: str
    bare: tuple[tuple[int, int], ...] = _FULL
    seen: Callable[[int], range] = lambda row: range(K)


SPELLINGS = (
    Spelling("masked_fill_inf", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, INF), v), "nan"),
    Spelling("where_inf", lambda q, k, v, m: _weigh(torch.where(m, _scores(q, k), INF), v), "nan"),
    Spelling("add_inf", lambda q, k, v, m: _weigh(_scores(q, k) + _fill(m, INF, q), v), "nan"),
    Spelling("add_minimum", lambda q, k, v, m: _weigh(_scores(q, k) + _fill(m, _min(q), q), v), "uniform"),
    Spelling("times_minimum", lambda q, k, v, m: _weigh(_scores(q, k) + (1.0 - m.to(q.dtype)) * _min(q), v), "uniform"),
    Spelling("fill_minimum", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, _min(q)), v), "uniform"),
    Spelling("where_minimum", lambda q, k, v, m: _weigh(torch.where(m, _scores(q, k), _min(q)), v), "uniform"),
    Spelling("fill_half_minimum", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, _min(q) / 2), v), "uniform"),
    Spelling("upcast_minimum", _upcast, "uniform"),
    Spelling("fill_ten_thousand", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, -1e4), v), "uniform"),
    Spelling("add_ten_thousand", lambda q, k, v, m: _weigh(_scores(q, k) + _fill(m, -1e4, q), v), "scores"),
    Spelling("sdpa_boolean", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), "zero"),
    Spelling("sdpa_inf", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, _fill(m, INF, q)), "zero"),
    Spelling("sdpa_lower_right", _lower_right, "zero", ((0, 0), (0, 1), (1, 0), (1, 1))),
    Spelling("sdpa_causal", lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3], is_causal=True), "none", ()),
    Spelling("weights_nan_to_num", lambda q, k, v, m: _scores(q, k).masked_fill(~m, INF).softmax(-1).nan_to_num(0.0) @ v, "zero"),
    Spelling("result_nan_to_num", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, INF), v).nan_to_num(0.0), "zero"),
    Spelling("weights_filled", lambda q, k, v, m: _scores(q, k).masked_fill(~m, _min(q)).softmax(-1).masked_fill(~m, 0.0) @ v, "zero"),
    Spelling("two_inf", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, INF).masked_fill(_LATER, INF), v), "nan"),
    Spelling("two_minima", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, _min(q)).masked_fill(_LATER, _min(q)), v), "uniform"),
    Spelling("two_minima_added", _two_added, "subset", seen=lambda row: range(row + 1)),
    Spelling("minimum_then_inf", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(~m, _min(q)).masked_fill(_FAR, INF), v), "subset", seen=lambda row: range(min(K, row + 3))),
    Spelling("inf_then_minimum", lambda q, k, v, m: _weigh(_scores(q, k).masked_fill(_FAR, INF).masked_fill(~m, _min(q)), v), "uniform"),
)  # fmt: skip


class _Everything(torch.nn.Module):
    """Every spelling on the same inputs, one site each."""

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(spelling.run(*args) for spelling in SPELLINGS)


Results = tuple[list[Tensor], dict[str, tuple[Tensor, Tensor]]]


@pytest.fixture(scope="module")
def results(options: Options) -> Callable[[torch.dtype], Results]:
    """By dtype: q, k and v, and of every spelling what the source and what the optimised module gives."""

    @functools.lru_cache
    def run(dtype: torch.dtype) -> Results:
        generator = torch.Generator().manual_seed(3)
        inputs = [torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in (Q, K, K)]
        net = _Everything()
        # The kernels of two dtypes are enough: another kind of bits in memory changes no row.
        chosen = options if dtype in (torch.float32, torch.float16) else replace(options, kernel="reference")
        fast = attnopt.optimize(net, (*inputs, _mask()), options=chosen, validate=False)
        assert [site.status for site in fast.report.sites] == ["fused"] * len(SPELLINGS), str(fast.report)
        pairs = zip(net(*inputs, _mask()), fast(*inputs, _mask()), strict=True)
        return inputs, {spelling.name: pair for spelling, pair in zip(SPELLINGS, pairs, strict=True)}

    return run


def _expected(spelling: Spelling, row: tuple[int, int], inputs: list[Tensor]) -> Tensor:
    """What the bare row gives, in fp64."""
    query, key, value = (x.double()[row[0]] for x in inputs)
    if spelling.gives == "scores" and inputs[0].dtype in (torch.float32, torch.float64):
        # A float32 keeps digits of a score beside -1e4; sixteen bits keep none, so there the row is uniform.
        return _weigh(_scores(query[:, row[1] : row[1] + 1], key), value)[:, 0]
    constant = {"zero": 0.0, "nan": math.nan}.get(spelling.gives)
    return (
        value[:, list(spelling.seen(row[1]))].mean(-2) if constant is None else torch.full_like(value[:, 0], constant)
    )


def _near(spelling: Spelling, inputs: list[Tensor]) -> float:
    """The bound on an entry's error: a weight's is that of its score, and of a few roundings more."""
    dtype = torch.float32 if spelling.name == "upcast_minimum" else inputs[0].dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(inputs[0].dtype).eps)
    largest = 1e4 if spelling.gives == "scores" and dtype.itemsize > 2 else float(_scores(*inputs[:2]).abs().max())
    return (largest + 8) * eps * float(inputs[2].abs().max())


@pytest.mark.filterwarnings("ignore::attnopt.runtime.dispatch.AttnoptWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=[s.name for s in SPELLINGS])
def test_a_fully_masked_row_gives_what_the_source_gave(
    spelling: Spelling, dtype: torch.dtype, results: Callable[[torch.dtype], Results]
) -> None:
    inputs, outputs = results(dtype)
    want, got = (x.double() for x in outputs[spelling.name])
    near = _near(spelling, inputs)
    torch.testing.assert_close(got, want, atol=near, rtol=0, equal_nan=True)
    exact = 0.0 if spelling.gives in ("zero", "nan") else near
    for entry, row in spelling.bare:
        bare = _expected(spelling, (entry, row), inputs)
        for result in (want, got):
            torch.testing.assert_close(result[entry, :, row], bare, atol=exact, rtol=0, equal_nan=True)
