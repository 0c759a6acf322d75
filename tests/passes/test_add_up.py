"""Outputs of attentions that are added are one attention with terms, in any layout that both share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnopt
from tests.forms import QKV, Form, check, numbers
from tests.modules import Function

HEAD = numbers(4)
BASE = "4 heads, d=8; score 0.353553*s"
sdpa = F.scaled_dot_product_attention


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(2, 7, 32).to(x.dtype)


def adapter(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """IP-Adapter: text keys, and image keys with a scale."""
    return joined(sdpa(q, k[:, :, :6], v[:, :, :6])) + 0.7 * joined(sdpa(q, k[:, :, 6:], v[:, :, 6:]))


def by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    image = (q @ k[:, :, 6:].mT).softmax(-1) @ v[:, :, 6:]
    return (q @ k[:, :, :6].mT).softmax(-1) @ v[:, :, :6] + image


def three(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    parts = [sdpa(q, k[:, :, i : i + 3], v[:, :, i : i + 3]) for i in (0, 3, 6)]
    return (parts[0] + g.view(4, 1, 1) * parts[1] - parts[2]) * 2


ROWS = (
    Form("adapter", adapter, f"{BASE} + ({BASE}; gate 0.7)", "decoupled"),
    Form("by_softmax", by_softmax, "4 heads, d=8; score s + (4 heads, d=8; score s)", "decoupled"),
    Form("three", three, f"{BASE}; gate 2 + ({BASE}; gate 2*gate[h]) + ({BASE}; gate -2)", "differential", (*QKV, HEAD)),
    Form("average", lambda q, k, v: sdpa(q, k, v) / 2 + sdpa(q, k, v, scale=0.5) / 2, f"{BASE}; gate 1/2 + (4 heads, d=8; score s/2; gate 1/2)", "average"),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_sum_is_one_site(row: Form) -> None:
    report = check(row)
    assert "add_up" in report.sites[0].rewrites


def _used_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x, y = sdpa(q, k, v), sdpa(q, k, v, scale=0.5)
    return x + y + x.relu()


APART = (
    ("used_elsewhere", _used_elsewhere, 2),
    ("product", lambda q, k, v: sdpa(q, k, v) * sdpa(q, k, v, scale=0.5), 2),
    ("with_itself", lambda q, k, v: (x := sdpa(q, k, v)) + x, 1),
    ("broadcast", lambda q, k, v: sdpa(q, k, v) + sdpa(q[:, :, :1], k, v), 2),
    ("another_layout", lambda q, k, v: sdpa(q, q, q).transpose(1, 2)[:, :4, :, :4] + sdpa(q, k, v)[:, :, :4, :4], 2),
    ("scaled_addition", lambda q, k, v: torch.add(sdpa(q, k, v), sdpa(q, k, v, scale=0.5), alpha=2), 2),
    ("residual", lambda q, k, v: q + sdpa(q, k, v), 1),
)


@pytest.mark.parametrize(("name", "run", "count"), APART, ids=lambda x: x if isinstance(x, str) else "")
def test_other_sums_stay_apart(name: str, run: object, count: int) -> None:
    fast = attnopt.optimize(Function(run), QKV, options=attnopt.Options(kernel="reference"))
    assert [len(s.spec.terms) for s in fast.report.sites if s.spec is not None] == [1] * count
    torch.testing.assert_close(fast(*QKV), Function(run)(*QKV))


def test_the_kernels_of_all_terms_are_reported() -> None:
    report = attnopt.optimize(Function(adapter), QKV, options=attnopt.Options(kernel="reference")).report
    assert report.sites[0].kernel == "reference"
    assert attnopt.Report.from_json(report.to_json()).sites[0].spec == report.sites[0].spec


def test_the_gradient_reaches_both_sets_of_keys() -> None:
    fast = attnopt.optimize(Function(adapter), QKV, options=attnopt.Options(kernel="reference"))
    leaves = [x.clone().requires_grad_() for x in QKV]
    fast(*leaves).square().sum().backward()
    assert all(bool((x.grad.abs().amax(-1) > 0).all()) for x in leaves[1:])  # type: ignore[union-attr]


def test_a_sum_of_any_length_is_one_site() -> None:
    q, k, v = (torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    module, varies = Function(ROWS[3].run).eval(), {2: torch.export.Dim.DYNAMIC}
    report = attnopt.explain(module, (q, k, v), dynamic_shapes={"args": (varies,) * 3})
    assert [s.status for s in report.sites] == ["fused"]
