"""Proofs by following elements: what the softmax's columns are, for which keys, and when there is no proof."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.patterns.chunks import _applied
from attnopt.patterns.followed import Proof, prove
from attnopt.patterns.grids import Unproven
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from tests.modules import captured
from tests.spellings.chunks import LENGTH, gathered, sheared

QKV = tuple(torch.randn(2, 3, LENGTH, 4) for _ in range(3))


def _proof(run: Callable[..., Tensor]) -> Proof:
    graph = captured(run, *QKV).gm.graph
    (softmax,) = (n for n in graph.nodes if n.name == "softmax")
    found = _applied(softmax)
    assert found is not None
    return prove(softmax, *found, Lifter(Sizes({})))[0]


def test_operands_band_and_dimensions_are_those_of_the_site() -> None:
    proof = _proof(lambda q, k, v: gathered(sheared(q, k).softmax(-1), v))
    b, h, q, d = proof.symbols
    assert (proof.query, proof.width) == (2, 3)
    assert [read.index for read in (*proof.operands, proof.value)] == [
        (b, h, q, ex.d),
        (b, h, ex.k, ex.d),
        (b, h, ex.k, d),
    ]
    assert [read.node.name for read in (*proof.operands, proof.value)] == ["args_0", "args_1", "args_2"]
    assert proof.keep == sp.And(sp.Ge(ex.k - q, -2), sp.Le(ex.k - q, 2))


def test_shared_key_heads_are_groups_of_query_heads() -> None:
    proof = _proof(lambda q, k, v: gathered(sheared(q, k[:, :1].expand(q.shape)).softmax(-1), v))
    assert proof.operands[1].index[1] == 0


def test_keys_with_another_length_of_memory_are_no_site() -> None:
    with pytest.raises(Unproven):
        _proof(lambda q, k, v: gathered(sheared(q, k).flip(-1).softmax(-1), v))


def test_rows_of_the_softmax_may_not_be_mixed() -> None:
    with pytest.raises(Unproven):
        _proof(lambda q, k, v: gathered(sheared(q, k).softmax(-1)[:, :, :1].expand(2, 3, LENGTH, 5), v))


def test_softmax_over_rows_is_no_site() -> None:
    with pytest.raises(Unproven):
        _proof(lambda q, k, v: gathered(sheared(q, k).softmax(2), v))
