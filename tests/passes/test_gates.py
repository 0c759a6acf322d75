"""A factor of each head's output joins the attention; any other product stays where it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnopt
from tests.forms import QKV, Form, check, numbers, scores
from tests.modules import Function

HEAD, ROUTES, BY_QUERY = numbers(4), numbers(2, 7, 4), numbers(2, 4, 7).abs() + 1
BASE = "4 heads, d=8; score 0.353553*s"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def routed_by_einsum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """MoH: the weights of the heads, token by token."""
    return torch.einsum("bne,bned->bned", g, attend(q, k, v).transpose(1, 2))


def routed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (attend(q, k, v).transpose(1, 2) * g.unsqueeze(-1)).flatten(2)


def after_the_heads_are_joined(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return attend(q, k, v).transpose(1, 2).reshape(2, 7, 32) * g.mean()


def twice(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (attend(q, k, v) * g.view(4, 1, 1)).transpose(1, 2) * 0.5


ROWS = (
    Form("head_mask", lambda q, k, v, g: attend(q, k, v) * g[None, :, None, None], f"{BASE}; gate gate[h]", "softmax", (*QKV, HEAD)),
    Form("divided", lambda q, k, v, g: attend(q, k, v) / g.unsqueeze(-1), f"{BASE}; gate gate[b, h, q]**(-1)", "mixture of heads", (*QKV, BY_QUERY)),
    Form("routed_by_einsum", routed_by_einsum, f"{BASE}; gate gate[b, h, q]", "mixture of heads", (*QKV, ROUTES)),
    Form("routed", routed, f"{BASE}; gate gate[b, h, q]", "mixture of heads", (*QKV, ROUTES)),
    Form("joined", after_the_heads_are_joined, f"{BASE}; gate gate[]", "softmax", (*QKV, HEAD)),
    Form("twice", twice, f"{BASE}; gate gate[h]/2", "softmax", (*QKV, HEAD)),
    Form("sdpa", lambda q, k, v, g: F.scaled_dot_product_attention(q, k, v) * g.view(4, 1, 1), f"{BASE}; gate gate[h]", "softmax", (*QKV, HEAD)),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_factor_of_the_heads_joins_the_attention(row: Form) -> None:
    report = check(row)
    assert report.sites[0].rewrites == ("gates",)


def _itself(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    out = attend(q, k, v)
    return out * out.sigmoid()


def _its_mean(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    out = attend(q, k, v)
    return out * out.mean(-1, keepdim=True)


def _used_elsewhere(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    out = attend(q, k, v)
    return out * g.view(4, 1, 1) + out.relu()


STAY = (
    ("each_feature", lambda q, k, v, g: attend(q, k, v) * v[:, :, :1]),
    ("wider_dtype", lambda q, k, v, g: attend(q, k, v) * g.double().view(4, 1, 1)),
    ("more_dimensions", lambda q, k, v, g: attend(q, k, v) * g.view(4, 1, 1, 1, 1)),
    ("itself", _itself),
    ("its_mean", _its_mean),
    ("used_elsewhere", _used_elsewhere),
    ("added", lambda q, k, v, g: attend(q, k, v) + g.view(4, 1, 1)),
)


@pytest.mark.parametrize(("name", "run"), STAY, ids=lambda x: x if isinstance(x, str) else "")
def test_any_other_product_stays(name: str, run: object) -> None:
    inputs = (*QKV, HEAD)
    fast = attnopt.optimize(Function(run), inputs, options=attnopt.Options(kernel="reference"))
    (site,) = fast.report.sites
    assert (str(site.spec), site.rewrites) == (BASE, ())
    torch.testing.assert_close(fast(*inputs), Function(run)(*inputs), rtol=1e-4, atol=1e-5, check_dtype=True)


def test_a_write_between_the_attention_and_its_factor_keeps_them_apart() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        v.mul_(2)
        return out * g.view(4, 1, 1)

    inputs = [x.clone() for x in (*QKV, HEAD)]
    expected = Function(run)(*[x.clone() for x in inputs])
    fast = attnopt.optimize(Function(run), tuple(x.clone() for x in inputs))
    torch.testing.assert_close(fast(*inputs), expected)
    assert all("gates" not in s.rewrites for s in fast.report.sites)


def test_a_model_of_half_precision_keeps_its_dtype() -> None:
    inputs = tuple(x.bfloat16() for x in (*QKV, HEAD))
    fast = attnopt.optimize(Function(ROWS[0].run), inputs, options=attnopt.Options(kernel="reference"))
    assert fast.report.sites[0].rewrites == ("gates",)
    assert fast(*inputs).dtype == torch.bfloat16
