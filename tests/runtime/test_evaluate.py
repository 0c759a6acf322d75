"""Every node that a spec may contain has a value in torch."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.runtime.evaluate import Scope, evaluate

AXES = {c: torch.arange(n) for c, n in zip(ex.COORDINATES, (2, 3, 4, 5), strict=True)}
TABLE = torch.randn(4, 5, dtype=torch.float64)


def value(expr: sp.Basic, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return evaluate(expr, Scope(AXES, {ex.n_k: 5}, {"t": TABLE, "f": torch.tensor([True, False])}, None, dtype))


@pytest.mark.parametrize(
    ("expr", "want"),
    [
        (ex.q - 2 * ex.k, lambda q, k: q - 2 * k),
        (ex.FloorDiv(ex.k - 3, 2), lambda q, k: (k - 3) // 2),
        (ex.Mod(ex.k - 3, 4), lambda q, k: (k - 3) % 4),
        (ex.Maximum(ex.q, ex.k), max),
        (ex.Minimum(ex.q, ex.n_k - 3), lambda q, k: min(q, 2)),
        (ex.Where(sp.Ge(ex.q - ex.k, 0), sp.Rational(1, 2), ex.NEG_INF), lambda q, k: 0.5 if q >= k else -torch.inf),
        (ex.Trunc((ex.k - 3) / sp.Integer(2)), lambda q, k: int((k - 3) / 2)),
        (ex.Snap(3 * ex.k - ex.q, sp.Integer(4)), lambda q, k: 4 * round((3 * k - q) / 4)),
        (sp.floor((ex.k - 3) / sp.Integer(2)), lambda q, k: (k - 3) // 2),
        (sp.Or(sp.Ge(ex.q - 3, 0), sp.Ne(ex.k, 2)), lambda q, k: q >= 3 or k != 2),
        (sp.exp(-ex.k), lambda q, k: torch.tensor(-k, dtype=torch.float64).exp()),
        (ex.number(-3.4028234663852886e38) + ex.k, lambda q, k: -3.4028234663852886e38 + k),
        (sp.Pow(ex.k + 1, -1), lambda q, k: 1 / (k + 1)),
        (ex.load("t", ex.q, ex.k), lambda q, k: TABLE[q, k]),
        (ex.load("t", 3 - ex.q, 2), lambda q, k: TABLE[3 - q, 2]),
        (ex.load("f", ex.Mod(ex.k, 2), integer=True), lambda q, k: k % 2 == 0),
    ],
)
def test_nodes(expr: sp.Basic, want: object) -> None:
    got = value(expr).expand(2, 3, 4, 5)[0, 0]
    expected = [[want(q, k) for k in range(5)] for q in range(4)]  # type: ignore[operator]
    assert torch.allclose(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


def test_the_node_table_knows_what_specs_may_contain() -> None:
    from attnopt.runtime.evaluate import _TABLE

    assert {ex.Load, ex.IntLoad} | set(_TABLE) == set(ex.KNOWN)


def test_constants_do_not_widen_half_precision() -> None:
    scores = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    scope = Scope(AXES, {}, {}, scores, torch.bfloat16)
    assert evaluate(ex.s * sp.Rational(1, 3), scope).dtype == torch.bfloat16


def test_snapping_keeps_what_is_not_finite_and_passes_the_gradient() -> None:
    scores = torch.tensor([5.0, 6.0, -7.0, torch.inf, -torch.inf, torch.nan]).view(1, 1, 1, 6).requires_grad_()
    snapped = evaluate(ex.Snap(ex.s, sp.Integer(4)), Scope(AXES, {}, {}, scores, torch.float32))
    want = torch.tensor([4.0, 8.0, -8.0, torch.inf, -torch.inf, torch.nan])
    torch.testing.assert_close(snapped.flatten(), want, equal_nan=True)
    snapped[..., :3].sum().backward()
    assert scores.grad is not None
    assert scores.grad.flatten()[:3].tolist() == [1.0, 1.0, 1.0]


def test_sigmoid_and_softplus_neither_overflow_nor_lose_digits() -> None:
    s = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0], requires_grad=True)
    axes = {c: torch.arange(1) for c in ex.COORDINATES}
    for expr, run in (
        (1 / (1 + sp.exp(-ex.s)), torch.sigmoid),
        (sp.log(1 + sp.exp(ex.s)), torch.nn.functional.softplus),
    ):
        found, expected = evaluate(expr, Scope(axes, {}, {}, s, torch.float32)), run(s)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        gradients = [torch.autograd.grad(x.sum(), s)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)
