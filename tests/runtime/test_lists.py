"""Lists of blocks against the dense mask, and kernels that go by them against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.grid import Grid
from attnopt.codegen.base import Plan
from attnopt.codegen.cpp_loads import k_axes
from attnopt.codegen.cpp_plans import Sizes, choose, listed
from attnopt.expr import b, h, k, n_k, n_q, q
from attnopt.runtime import lists
from attnopt.runtime.build import build
from attnopt.runtime.compile import vector_lanes
from attnopt.runtime.dispatch import Dispatcher, kernel_used
from attnopt.runtime.lists import Lists, packed, pay, sizes_of
from attnopt.runtime.native import Native, layout_of
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads
from tests.analysis.keeps import KEEPS, grids

HEADS = Heads(6, 2, 2, 16, 8)
CAUSAL = k <= q + n_k - n_q
MAP = sp.Ne(ex.load("map", b, h, ex.FloorDiv(q, 32), ex.FloorDiv(k, 32), integer=True), 0)
SAME = sp.Eq(ex.load("ids", b, q, integer=True), ex.load("ids", b, k, integer=True))


def spec(keep: sp.Basic, *captures: tuple[str, int]) -> AttentionSpec:
    """Six heads over two key heads, with a mask."""
    given = tuple(Capture(name, "int", (None,) * rank) for name, rank in captures)
    made = AttentionSpec(HEADS, score=ex.s / 4, keep=keep, empty_row=EmptyRow.ZERO, captures=given, returns=("lse",))
    return made.canonical()


def inputs(n_q: int, n_k: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v for `HEADS`."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((6, n_q, 16), (2, n_k, 16), (2, n_k, 8))
    first, second, third = (torch.randn(batch, *s, generator=g) for s in shapes)
    return first, second, third


@settings(max_examples=60, deadline=None, derandomize=True)
@given(KEEPS, grids(), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_no_kept_key_is_missing_and_no_masked_one_is_called_full(
    keep: sp.Basic, grid: Grid, block: tuple[int, int]
) -> None:
    batch, heads, rows, keys = grid.shape
    scalars = tuple(grid.scalars)
    given = tuple(Capture(name, "int", (None,) * a.ndim) for name, a in grid.captures.items())
    site = AttentionSpec(Heads(heads, heads, heads, 4, 4), keep=keep, captures=given, scalars=scalars)
    tensors = [torch.from_numpy(a) for a in grid.captures.values()]
    found = Lists(site, block)(
        torch.zeros(batch, heads, rows, 4), torch.zeros(batch, heads, keys, 4), tensors, list(grid.scalars.values())
    )
    dense = torch.from_numpy(grid.dense(keep).copy())
    found = found.expand(batch, heads, *found.shape[2:])
    for place in torch.cartesian_prod(*map(torch.arange, found.shape[:3])).tolist():
        whole, count, *blocks = found[tuple(place)].tolist()
        tile = dense[place[0], place[1], place[2] * block[0] : (place[2] + 1) * block[0]]
        blocks = blocks[:count]
        assert len(set(blocks)) == count
        assert blocks[:whole] == sorted(blocks[:whole])
        visited = torch.zeros(keys, dtype=torch.bool)
        for i, one in enumerate(blocks):
            part = slice(one * block[1], (one + 1) * block[1])
            visited[part] = True
            assert i >= whole or bool(tile[:, part].all())
        assert not bool((tile & ~visited).any())


# A short window for two heads, all keys for the others.
WIDTH = ex.Where(h < 2, sp.Integer(70), sp.Integer(1 << 30))


def _native(site: AttentionSpec, tensors: Sequence[Tensor], dispatcher: Dispatcher, plan: Plan) -> Native:
    q_like = torch.zeros(1, dtype=torch.float32)
    layout = layout_of(k_axes(site), q_like, tensors)
    return Native(site, build(site, layout, dispatcher.options, dispatcher.warn, plan=plan), plan)


def _documents(n: int) -> Tensor:
    return torch.randint(0, 5, (2, n), generator=torch.Generator().manual_seed(3)).sort(-1).values


CASES = {
    "sinks and window": (spec(sp.And(CAUSAL, sp.Or(k < 4, k > q + n_k - n_q - WIDTH))), lambda n: []),
    "map of blocks": (
        spec(sp.And(CAUSAL, MAP), ("map", 4)),
        lambda n: [torch.rand(2, 6, 7, 7, generator=torch.Generator().manual_seed(4)) < 0.3]),
    "documents": (spec(sp.And(SAME, k <= q), ("ids", 2)), lambda n: [_documents(n)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels_that_go_by_a_list(name: str, own_cache: Dispatcher) -> None:
    site, make = CASES[name]
    for rows, keys in ((200, 200), (70, 200), (2, 200), (1, 33), (130, 40)):
        captures = make(200)
        plan = listed(choose(site, Sizes(2, rows, keys), vector_lanes()), 64)
        q_, k_, v_ = inputs(rows, keys)
        out, lse = _native(site, captures, own_cache, plan)(q_, k_, v_, captures, [])
        want, want_lse = reference(site, q_.double(), k_.double(), v_.double(), captures)
        torch.testing.assert_close(out.double(), want, atol=4e-6, rtol=0)
        assert lse is not None
        torch.testing.assert_close(lse.double(), want_lse, atol=4e-6, rtol=0)


def test_a_map_finer_and_coarser_than_the_tiles() -> None:
    q_, k_, _ = inputs(100, 100)
    kept = torch.rand(2, 6, 100, 13, generator=torch.Generator().manual_seed(5)) < 0.2
    for rows, keys, tile in ((1, 8, (16, 16)), (1, 8, (24, 4)), (1, 8, (7, 12))):
        site = spec(sp.Ne(ex.load("map", b, h, q, ex.FloorDiv(k, keys), integer=True), 0), ("map", 4))
        classes = Lists(site, tile).classes(sizes_of(site, q_, k_, []), {"map": kept}, q_.device)
        dense = kept.repeat_interleave(rows, 2).repeat_interleave(keys, 3)[..., :100]
        for i in range(classes.shape[2]):
            for j in range(classes.shape[3]):
                part = dense[:, :, i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]].flatten(2)
                torch.testing.assert_close(classes[:, :, i, j] == 0, ~part.any(-1))
                torch.testing.assert_close(classes[:, :, i, j] == 2, part.all(-1))


def test_what_does_not_depend_on_data_is_made_once() -> None:
    site, _ = CASES["sinks and window"]
    q_, k_, _ = inputs(200, 200)
    lists = Lists(site, (64, 64))
    assert lists(q_, k_, [], []) is lists(q_, k_, [], [])
    assert lists(q_, k_, [], []).shape[:2] == (1, 6)


def test_when_a_list_pays() -> None:
    q_, k_, _ = (t[:1, :, :1].expand(1, -1, 2048, -1) for t in inputs(1, 1))
    want = {"map of blocks": True, "documents": True}
    for name, pays in want.items():
        assert pay(CASES[name][0], sizes_of(CASES[name][0], q_, k_, [])) is pays
    sinks = spec(sp.And(CAUSAL, sp.Or(k < 4, k > q - 300)))
    assert pay(sinks, sizes_of(sinks, q_, k_, []))
    for keep in (sp.true, CAUSAL, sp.And(CAUSAL, k > q - 300)):
        assert not pay(spec(keep), sizes_of(spec(keep), q_, k_, []))
    small = inputs(100, 100)
    assert not pay(CASES["documents"][0], sizes_of(CASES["documents"][0], small[0], small[1], []))


def test_the_operator_takes_lists_where_they_pay(own_cache: Dispatcher) -> None:
    site = replace(spec(sp.And(CAUSAL, MAP), ("map", 4)), returns=())
    kept = torch.rand(2, 6, 7, 7, generator=torch.Generator().manual_seed(4)) < 0.3
    q_, k_, v_ = inputs(200, 200)
    out, _ = attention(site, q_, k_, v_, [kept])
    want, _ = reference(site, q_.double(), k_.double(), v_.double(), [kept])
    torch.testing.assert_close(out.double(), want, atol=4e-6, rtol=0)
    assert kernel_used(site.key) == "cpp"
    (backend,) = own_cache.sites[site.text].backends.values()
    assert backend.plan.listed == 64


def test_the_list_of_equal_data_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    site = spec(SAME & CAUSAL, ("ids", 2))
    made = Lists(site, (4, 4))
    seen: list[int] = []
    real = Lists.classes
    monkeypatch.setattr(Lists, "classes", lambda self, *args: (seen.append(1), real(self, *args))[1])
    query, key, _ = inputs(16, 16)
    ids = torch.arange(16).div(4, rounding_mode="floor").expand(2, -1).contiguous()
    first = made(query, key, [ids], [])
    assert torch.equal(made(query, key, [ids.clone()], []), first)
    assert torch.equal(made(query, key, [ids.t().contiguous().t()], []), first)
    assert len(seen) == 1
    ids.numpy()[:, 8:] = 1  # nothing in the tensor says that its memory was written to
    assert torch.equal(
        made(query, key, [ids], []), packed(real(made, sizes_of(site, query, key, []), {"ids": ids}, ids.device))
    )
    assert not torch.equal(made(query, key, [ids], []), first)
    assert len(seen) == 2
    assert torch.equal(made(query, key, [ids.int()], []), made(query, key, [ids], []))


def test_data_that_are_many_or_inexact_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    site = replace(spec(SAME, ("ids", 2)), captures=(Capture("ids", "int", (None, None)),))
    made, (query, key, _) = Lists(site, (4, 4)), inputs(16, 16)
    made(query, key, [torch.zeros(2, 16)], [])
    assert not made.seen
    monkeypatch.setattr(lists, "_COMPARED", 31)
    made(query, key, [torch.zeros(2, 16, dtype=torch.int64)], [])
    assert not made.seen
    monkeypatch.setattr(lists, "_COMPARED", 32)
    monkeypatch.setattr(lists, "_SEEN", 2)
    for length in (4, 8, 12, 16):
        made(query[:, :, :length], key[:, :, :length], [torch.zeros(2, length, dtype=torch.int64)], [])
    assert len(made.seen) <= 2
