"""The operator table refuses what it cannot express. Every entry's numbers: test_lift.py."""

from __future__ import annotations

from typing import Any

import pytest
import sympy as sp
import torch
import torch.nn.functional as F

from attnopt import expr as ex
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


ACTIVATIONS = (
    ("aten::softplus", F.softplus, ()),
    ("aten::softplus", lambda x: F.softplus(x, 2.0, 30.0), (sp.Integer(2), sp.Integer(30))),
    ("aten::log_sigmoid", F.logsigmoid, ()),
    ("aten::silu", F.silu, ()),
    ("aten::gelu", F.gelu, ()),
    ("aten::gelu", lambda x: F.gelu(x, approximate="tanh"), ("tanh",)),
    ("aten::elu", F.elu, ()),
    ("aten::elu", F.selu, (sp.Rational(1.6732632423543772), sp.Rational(1.0507009873554805))),
    ("aten::leaky_relu", F.leaky_relu, ()),
    ("aten::leaky_relu", lambda x: F.leaky_relu(x, 0.3), (sp.Rational(0.3),)),
    ("aten::relu6", F.relu6, ()),
    ("aten::hardtanh", F.hardtanh, ()),
    ("aten::expm1", torch.expm1, ()),
)


@pytest.mark.parametrize(("name", "run", "more"), ACTIVATIONS, ids=range(len(ACTIVATIONS)))
def test_activations_have_the_source_s_values(name: str, run: Any, more: tuple[Any, ...]) -> None:
    places = torch.linspace(-30, 30, 41, dtype=torch.float64)
    found = [float(POINTWISE[name](ex.number(x), *more)) for x in places.tolist()]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), run(places), rtol=1e-9, atol=1e-12)


def test_a_decay_is_an_exponential_of_the_distance() -> None:
    found = POINTWISE["aten::pow"](sp.Rational(0.9), q - k)
    assert float(found.subs({q: 7, k: 2})) == pytest.approx(0.9**5, rel=1e-12)
    with pytest.raises(NotImplementedError, match="cut off early"):
        POINTWISE["aten::softplus"](q, sp.S.One, sp.Integer(3))
