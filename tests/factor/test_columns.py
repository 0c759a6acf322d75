"""Columns of an expression, against the reference's value of it."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.factor.columns import Columns
from attnopt.region import Operand, Region
from attnopt.runtime import op  # noqa: F401  (registers attnopt::attention)
from tests.passes.tiny import HEADS, model, output, stage

EXPRESSIONS = [
    sp.Rational(1, 3), ex.q, ex.h, ex.q * ex.h + 2, ex.q**2 / 7 - ex.q, sp.exp(-ex.q / 5), sp.sin(ex.q) * ex.h,
    sp.sqrt(ex.q + 1), sp.Abs(ex.q - 3),
]  # fmt: skip


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_columns_hold_the_expression(expr: sp.Expr) -> None:
    module, x = model("separate")
    at = stage(module, x)
    (key,) = at.regions
    region = at.plain(key)
    assert isinstance(region, Region)
    columns = Columns(at, region, region.query, ex.q)
    joined = columns.joined([columns.column(expr)])
    (end,) = (n for n in at.gm.graph.nodes if n.op == "output")
    end.args = ((joined,),)
    at.finish()
    got = output(at)[..., -1]
    want = [[float(expr.subs({ex.h: h, ex.q: q})) for q in range(5)] for h in range(HEADS)]
    assert got.dtype == torch.float64
    assert_close(got, torch.tensor(want, dtype=torch.float64).expand(2, -1, -1), atol=1e-12, rtol=0)


def test_what_has_no_operator_is_said() -> None:
    module, x = model("separate")
    at = stage(module, x)
    (key,) = at.regions
    region = at.plain(key)
    assert isinstance(region, Region)
    region = region.replace(captures={"table": Operand(region.query.node, ("i0",))})
    columns = Columns(at, region, region.query, ex.q)
    for expr in (ex.Mod(ex.q, 3), ex.load("table", ex.q + 1)):
        with pytest.raises(NotImplementedError):
            columns.column(expr)
