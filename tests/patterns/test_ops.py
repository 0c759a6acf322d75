"""The operator table refuses what it cannot express. Every entry's numbers: test_lift.py."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt.expr import Where, k, q
from attnopt.patterns.ops import POINTWISE

REFUSED = (
    ("aten::div", (q, k, "trunc")), ("aten::pow", (q, k)), ("aten::pow", (q, sp.Rational(7, 2))),
    ("aten::bitwise_and", (q, k)), ("aten::bitwise_not", (q,)),
)  # fmt: skip


@pytest.mark.parametrize(("name", "args"), REFUSED, ids=range(len(REFUSED)))
def test_refused(name: str, args: tuple[object, ...]) -> None:
    with pytest.raises(NotImplementedError):
        POINTWISE[name](*args)


def test_constants_join_the_branches_of_a_mask() -> None:
    mask = Where(k > q, sp.S.One, sp.S.Zero)
    assert POINTWISE["aten::mul"](POINTWISE["aten::rsub"](mask, sp.S.One), sp.Integer(-5)) == Where(
        k > q, sp.S.Zero, sp.Integer(-5)
    )
