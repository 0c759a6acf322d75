"""Selections against their definition in plain loops, and attention under them against dense attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.errors import AttnoptError, SpecError
from attnopt.expr import b, k, n_k, n_q, q
from attnopt.runtime.chosen import chosen
from attnopt.runtime.dispatch import kernel_used
from attnopt.runtime.op import attention
from attnopt.runtime.reference import Sample, reference
from attnopt.select import Select
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads
from tests.runtime.cases import dense

HEADS = Heads(6, 2, 2, 8, 8)
BOTTOM = q + n_k - n_q
PAD = sp.Ne(ex.load("pad", b, k, integer=True), 0)


def _spec(select: Select, keep: Any = k <= BOTTOM, pad: bool = False) -> AttentionSpec:
    captures = (Capture("pad", "bool", (None, None)),) if pad else ()
    keep = sp.And(keep, PAD) if pad else keep
    made = AttentionSpec(HEADS, score=ex.s / 4, keep=keep, select=select, captures=captures, empty_row=EmptyRow.ZERO)
    return made.canonical()


def _select(rule: str, *amount: Any, **parts: Any) -> Select:
    options = {"block": 16, "tile": 16, "own": BOTTOM, "first": 1, "scale": sp.Rational(1, 4), **parts}
    return Select(rule, tuple(map(sp.Rational, amount)), **options)


def _inputs(rows: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, rows, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    first, second, third = (torch.randn(s, generator=g) for s in shapes)
    return first, second, third


def _mask(spec: AttentionSpec, rows: int, keys: int, pad: Tensor | None) -> Tensor:
    """`keep` of these specs by hand, `[2, n_q, n_k]`."""
    place = torch.arange(keys)
    kept = torch.ones(rows, keys, dtype=torch.bool)
    if ex.depends(spec.keep, q):
        kept = place <= torch.arange(rows)[:, None] + keys - rows
    kept = kept.expand(2, -1, -1)
    return kept if pad is None else kept & pad[:, None]


def _by_hand(spec: AttentionSpec, q_: Tensor, k_: Tensor, pad: Tensor | None = None) -> Tensor:
    """The definition, one tile at a time, in fp64."""
    select, rows, keys = spec.select, q_.shape[2], k_.shape[2]
    assert select is not None
    kept = _mask(spec, rows, keys, pad)
    tiles, blocks = -(-rows // select.tile), -(-keys // select.block)
    made = torch.zeros(2, 6, tiles, blocks, dtype=torch.bool)
    for entry in range(2):
        counts = torch.ones(keys, dtype=torch.bool) if pad is None else pad[entry]
        for head in range(6):
            group = [x for x in range(6) if x // 3 == head // 3] if select.shared else [head]
            number = select.amount[(head // 3 if select.shared else head) if len(select.amount) > 1 else 0]
            for tile in range(tiles):
                span = range(tile * select.tile, min((tile + 1) * select.tile, rows))
                query = q_[entry, group][:, list(span)].double().mean((0, 1))
                own = [(x + keys - rows) // select.block for x in span] if select.own is not None else []
                scores: dict[int, tuple[float, float]] = {}
                for block in range(blocks):
                    part = slice(block * select.block, (block + 1) * select.block)
                    if kept[entry, list(span), part].any():
                        held = k_[entry, head // 3, part][counts[part]].double()
                        scores[block] = float(query @ held.mean(0)) * float(select.scale), math.log(len(held))
                forced = {x for x in scores if min(own, default=0) <= x <= max(own, default=-1)}
                forced |= set(sorted(scores)[: select.first])
                best = _best(select.rule, float(number), scores, forced)
                made[entry, head, tile, list(best | forced)] = True
    return made


def _best(rule: str, number: float, scores: dict[int, tuple[float, float]], forced: set[int]) -> set[int]:
    rank = {x: s if rule == "topk" else s + c for x, (s, c) in scores.items()}
    order = sorted(scores, key=lambda x: (x not in forced, -math.inf if x in forced else -rank[x], x))
    if rule == "topk":
        return set(order[: int(number)])
    total, reached, taken = sum(math.exp(x) for x in rank.values()), 0.0, set()
    for x in order:
        if reached >= number:
            break
        taken.add(x)
        reached += math.exp(rank[x]) / total
    return taken


SELECTS = {
    "topk": _select("topk", 3),
    "mass": _select("mass", "0.6"),
    "each head": _select("topk", 1, 2, 3, 4, 5, 6, first=0),
    "shared": _select("mass", "0.3", "0.8", shared=True),
    "single queries": _select("topk", 2, tile=1, block=8, first=0),
    "wide tiles": _select("mass", "0.6", tile=32, block=8),
    "nowhere": _select("topk", 2, own=None, first=0),
}
SIZES = ((70, 70), (1, 70), (21, 70), (70, 9), (40, 16))


@pytest.mark.parametrize("name", SELECTS)
def test_the_definition(name: str) -> None:
    for keep in (k <= BOTTOM, sp.true):
        spec = _spec(SELECTS[name], keep)
        for rows, keys in SIZES:
            q_, k_, _ = _inputs(rows, keys)
            assert torch.equal(chosen(spec, q_, k_), _by_hand(spec, q_, k_)), (keep, rows, keys)


def test_padding_is_no_candidate_and_counts_in_no_mean() -> None:
    spec = _spec(SELECTS["topk"], pad=True)
    q_, k_, v_ = _inputs(70, 70)
    pad = torch.arange(70) >= torch.tensor([[37], [0]])
    want = _by_hand(spec, q_, k_, pad)
    assert not want[0, :, :, :2].any(), "the first blocks of a left-padded entry are none of its keys"
    k_[0, :, :37] = torch.nan
    v_[0, :, :37] = 0
    assert torch.equal(chosen(spec, q_, k_, [pad]), want)


def _expanded(picked: Tensor, select: Select, rows: int, keys: int) -> Tensor:
    return picked.repeat_interleave(select.tile, 2).repeat_interleave(select.block, 3)[:, :, :rows, :keys]


@pytest.mark.parametrize("name", ["each head", "shared"])
def test_attention_under_a_selection_is_dense_attention_under_its_mask(name: str) -> None:
    spec = _spec(SELECTS[name], pad=True)
    assert spec.select is not None
    for rows, keys in SIZES[:4]:
        inputs = [t.requires_grad_() for t in _inputs(rows, keys)]
        pad = torch.arange(keys) >= torch.tensor([[3], [0]])
        kept = _expanded(chosen(spec, *inputs[:2], [pad]), spec.select, rows, keys)
        kept = kept & _mask(spec, rows, keys, pad)[:, None]
        want, _ = dense(spec, *inputs, scale=0.25, bias=0.0, keep=kept)
        out, _ = attention(spec, *inputs, [pad])
        torch.testing.assert_close(out.double(), want.nan_to_num(0.0), atol=4e-6, rtol=0)
        assert kernel_used(spec.key) == "cpp"
        grads = torch.autograd.grad(out.square().sum(), inputs)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        golden = torch.autograd.grad(reference(spec, *wide, [pad])[0].square().sum(), wide)
        for got, exact in zip(grads, golden, strict=True):
            torch.testing.assert_close(got.double(), exact, atol=3e-5, rtol=0)


def test_everything_selected_is_dense_attention() -> None:
    q_, k_, v_ = _inputs(70, 70)
    plain = replace(_spec(SELECTS["topk"]), select=None)
    want, _ = reference(plain, q_.double(), k_.double(), v_.double())
    for select in (_select("topk", 99), _select("mass", 1)):
        spec = _spec(select, pad=True)
        pad = torch.ones(2, 70, dtype=torch.bool)
        assert bool(chosen(spec, q_, k_, [pad])[..., -1, :].all())
        torch.testing.assert_close(attention(spec, q_, k_, v_, [pad])[0].double(), want, atol=4e-6, rtol=0)


def test_ties_and_what_is_no_number() -> None:
    spec = _spec(_select("topk", 2, own=None, first=0), sp.true)
    q_, k_ = torch.ones(1, 6, 1, 8), torch.ones(1, 2, 70, 8)
    assert chosen(spec, q_, k_)[0, 0, 0].tolist() == [True, True, False, False, False]
    k_[0, 0, 50] = torch.nan
    assert chosen(spec, q_, k_)[0, 0, 0].tolist() == [True, False, False, True, False]
    assert not bool(reference(spec, q_, k_, k_)[0][0, 0].isfinite().any())


def test_the_choice_is_the_same_in_every_dtype_that_holds_the_inputs() -> None:
    q_, k_, _ = _inputs(70, 70)
    q_, k_ = q_.bfloat16(), k_.bfloat16()
    for spec in map(_spec, SELECTS.values()):
        picks = [chosen(spec, q_.to(t), k_.to(t)) for t in (torch.bfloat16, torch.float32, torch.float64)]
        assert torch.equal(picks[0], picks[1])
        assert torch.equal(picks[1], picks[2])


def test_without_queries_keys_or_fit() -> None:
    spec = _spec(SELECTS["topk"])
    for rows, keys in ((0, 5), (5, 0)):
        out, _ = attention(spec, *_inputs(rows, keys))
        assert out.shape == (2, 6, rows, 8)
        assert not out.any()
    with pytest.raises(AttnoptError):
        attention(spec, *(t[:, :1] for t in _inputs(5, 5)))
    q_, k_, v_ = _inputs(5, 5)
    with pytest.raises(SpecError, match="whole inputs"):
        reference(spec, q_[:1], k_[:1], v_[:1], sample=Sample(torch.tensor([1]), whole_batch=2))
    rows = torch.tensor([1, 4])
    part, _ = reference(spec, q_, k_, v_, rows=rows)
    torch.testing.assert_close(part, reference(spec, q_, k_, v_)[0][:, :, rows])
