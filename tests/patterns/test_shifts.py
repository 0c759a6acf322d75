"""Row constants: found where a maximum is subtracted, taken off only where it is the row's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.shifts import maximum, remove, unshifted
from tests.modules import captured

X, Y = torch.randn(2, 4, 7, 9), torch.randn(2, 4, 7, 9)
SIZES = {ex.b: 2, ex.h: 4, ex.q: 7, ex.k: 9}
ROWS: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor], bool], ...] = (
    ("amax", lambda x, y: x - x.amax(-1, keepdim=True), True),
    ("max", lambda x, y: x - x.max(-1, keepdim=True).values, True),
    ("max_unsqueezed", lambda x, y: x - x.max(-1)[0][..., None], True),
    ("detached", lambda x, y: x - x.amax(-1, keepdim=True).detach(), True),
    ("with_a_sink", lambda x, y: x - torch.maximum(x.amax(-1, keepdim=True), y[..., :1]), True),
    ("of_the_unmasked", lambda x, y: x.masked_fill(y.isnan(), float("-inf")) - x.amax(-1, keepdim=True), True),
    ("of_another_row", lambda x, y: x - y.amax(-1, keepdim=True), False),
    ("over_queries", lambda x, y: x - x.amax(-2, keepdim=True), False),
    ("of_everything", lambda x, y: x - x.amax(), False),
    ("minimum", lambda x, y: x - x.amin(-1, keepdim=True), False),
)


@pytest.mark.parametrize(("name", "run", "taken"), ROWS, ids=[name for name, _, _ in ROWS])
def test_maxima(name: str, run: Callable[[Tensor, Tensor], Tensor], taken: bool) -> None:
    graph = captured(run, X, Y).gm.graph
    lifter = Lifter(Sizes({c: sp.Integer(n) for c, n in SIZES.items()}))
    logit = ex.as_number(lifter.lift(graph.output_node().args[0][0], (ex.b, ex.h, ex.q, ex.k)))
    (found,) = unshifted([logit], lifter)
    assert (found != logit) == taken
    assert (maximum(next(n for n in graph.nodes if "max" in n.name)) is not None) if taken else True


def test_every_branch_must_hold_the_shift() -> None:
    m = ex.load("m", ex.q)
    c = sp.Le(ex.k, ex.q)
    assert remove(ex.Where(c, ex.s - m, ex.NEG_INF), -m) == ex.Where(c, ex.s, ex.NEG_INF)
    assert remove(ex.Where(c, ex.s - m, sp.Integer(-5)), -m) is None
    assert remove(ex.s, -m) is None
