"""The choice of blocks in exportable operators is the one that `runtime.chosen` defines, ties and NaN included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.expr import b, k, n_k, n_q, q
from attnopt.onnx import choice
from attnopt.runtime.chosen import chosen
from attnopt.runtime.reference import reference
from attnopt.select import Select
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads

BOTTOM = q + n_k - n_q
CAUSAL = k <= BOTTOM
PAD = sp.Ne(ex.load("pad", b, k, integer=True), 0)
SINKS = sp.Or(k < 3, BOTTOM - k < 20)


def _spec(keep: Any, rule: str = "topk", *amount: Any, **parts: Any) -> AttentionSpec:
    given = {"block": 16, "tile": 16, "own": BOTTOM, "first": 1, "scale": sp.Rational(1, 4), **parts}
    select = Select(rule, tuple(map(sp.Rational, amount or (2,))), **given)
    captures = (Capture("pad", "bool", (None, None)),) if sp.sympify(keep).has(ex.Load) else ()
    made = AttentionSpec(
        Heads(6, 2, 2, 8, 8), ex.s / 4, keep, select=select, captures=captures, empty_row=EmptyRow.ZERO
    )
    return made.canonical()


SPECS = {
    "causal": _spec(CAUSAL),
    "window": _spec(sp.And(CAUSAL, SINKS), "topk", 3),
    "padded": _spec(sp.And(CAUSAL, PAD)),
    "everything": _spec(sp.true, own=None),
    "each head": _spec(CAUSAL, "topk", 1, 2, 3, 4, 5, 6),
    "shared": _spec(CAUSAL, "topk", 2, 3, shared=True),
    "narrow tiles": _spec(CAUSAL, "topk", 2, tile=4, block=32),
    "mass": _spec(sp.And(CAUSAL, PAD), "mass", sp.Rational(3, 4)),
    "shared mass": _spec(sp.true, "mass", sp.Rational(1, 2), shared=True, first=0),
}


def _inputs(rows: int, keys: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    q_, k_, v = (torch.randn(2, h, n, 8, generator=g) for h, n in ((6, rows), (2, keys), (2, keys)))
    pad = torch.rand(2, keys, generator=g) > 0.3
    pad[0, : keys // 2] = False
    return q_, k_, v, pad


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("rows", "keys"), [(50, 77), (64, 64), (5, 9)])
def test_the_mask_holds_the_blocks_of_the_definition(name: str, rows: int, keys: int) -> None:
    spec, (q_, k_, v, pad) = SPECS[name], _inputs(rows, keys)
    captures = [pad] if spec.captures else []
    plain, operands = choice.operands(spec, q_, k_, captures, ())
    wanted = chosen(spec, q_, k_, captures)
    rows_of = torch.arange(rows) // spec.select.tile
    keys_of = torch.arange(keys) // spec.select.block
    assert torch.equal(operands[-1], wanted[:, :, rows_of][:, :, :, keys_of])
    found, lse = reference(plain, q_, k_, v, operands)
    out, total = reference(spec, q_, k_, v, captures)
    assert torch.equal(found, out)
    assert torch.equal(lse, total)


def test_equal_scores_go_to_the_first_blocks_and_nan_comes_first() -> None:
    spec = _spec(sp.true, "topk", 2, own=None, first=0)
    q_, k_ = torch.ones(1, 6, 16, 8), torch.ones(1, 2, 80, 8)
    kept = choice.operands(spec, q_, k_, (), ())[1][-1]
    assert kept.all(2).all(1)[0].nonzero().flatten().tolist() == list(range(32))
    k_[:, :, 70] = torch.nan
    kept = choice.operands(spec, q_, k_, (), ())[1][-1]
    assert kept[0, 0, 0].nonzero().flatten().tolist() == [*range(16), *range(64, 80)]


def test_the_name_of_the_mask_is_free_and_nothing_chosen_changes_nothing() -> None:
    spec = replace(_spec(CAUSAL), captures=(Capture("chosen", "bool", (None, None)),))
    assert choice.as_mask(spec).captures[-1].name == "chosen0"
    plain = replace(spec, select=None)
    assert choice.as_mask(plain) is plain
    assert choice.operands(plain, torch.zeros(1), torch.zeros(1), [torch.ones(1)], ())[0] is plain


def test_a_mask_whose_empty_tiles_cannot_be_told_is_an_error() -> None:
    documents = sp.Eq(ex.load("ids", b, q, integer=True), ex.load("ids", b, k, integer=True))
    spec = replace(_spec(CAUSAL), keep=documents, captures=(Capture("ids", "int", (None, None)),))
    q_, k_, _, pad = _inputs(20, 20)
    with pytest.raises(SpecError, match="cannot be chosen in ONNX under the mask"):
        choice.operands(spec, q_, k_, [pad.long()], ())
