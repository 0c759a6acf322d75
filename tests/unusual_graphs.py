"""Rows of graphs that no recogniser expects: (name, run, inputs, what becomes of them)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

GENERATOR = torch.Generator().manual_seed(3)
QKV = tuple(torch.randn(2, 3, 5, 4, generator=GENERATOR) for _ in range(3))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention."""
    return (q @ k.mT).softmax(-1) @ v


@dataclass(frozen=True)
class Row:
    """A function, its inputs, how many sites `optimize` fuses, and words of the reason or note where one is not.

    `golden` is what to compute in fp64 where `run` names an element type itself.
    """

    name: str
    run: Callable[..., Any]
    inputs: tuple[Any, ...] = QKV
    fused: int = 0
    words: str = ""
    golden: Callable[..., Any] | None = None


# --- operators that nobody knows --------------------------------------------------------------------


@torch.library.custom_op("attnopt_unusual::scaled", mutates_args=())
def scaled(x: Tensor, by: float) -> Tensor:
    """A user's operator on scores."""
    return x * by


@scaled.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("attnopt_unusual::shift_", mutates_args={"x"})
def shift_(x: Tensor) -> None:
    """A user's operator that writes to its argument."""
    x.add_(1.0)


def _written_by_an_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    shift_(scores)
    return scores.softmax(-1) @ v


UNKNOWN = (
    Row("operator_on_the_scores", lambda q, k, v: scaled(q @ k.mT, 2.0).softmax(-1) @ v, words="no contraction"),
    Row("operator_on_the_output", lambda q, k, v: scaled(attend(q, k, v), 2.0), fused=1),
    Row("operator_on_the_queries", lambda q, k, v: attend(scaled(q, 2.0), k, v), fused=1),
    Row("operator_that_writes", _written_by_an_operator, words=""),
    Row("fft_around", lambda q, k, v: torch.fft.ifft(torch.fft.fft(attend(q, k, v))).real, fused=1),
)

# --- graphs in graphs -------------------------------------------------------------------------------


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attend(q, k, v)


def _autocast_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return attend(q, k, v)


def _autocast_after_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return scores.softmax(-1) @ v


def _autocast_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = q @ k.mT
    return scores.float().softmax(-1) @ v


def _no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return attend(q, k, v)


def _chosen_backend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _two_levels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.cond(q.sum() > 1e6, lambda q, k, v: attend(q, k, v * 2), attend, (q, k, v))
    return out + attend(q, k, v)


def _while(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    start = (torch.tensor(0), q)
    return torch.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, attend(x, k, v)), start)[1]


NESTED = (
    Row("autocast", _autocast, fused=1),
    Row("autocast_off", _autocast_off, fused=1),
    Row("autocast_after_the_scores", _autocast_after_the_scores, words="no contraction"),
    Row("autocast_of_the_scores", _autocast_of_the_scores, words="no contraction", golden=attend),
    Row("no_grad", _no_grad, fused=1),
    Row("checkpoint", lambda q, k, v: checkpoint(attend, q, k, v, use_reentrant=False), fused=1),
    Row("cond", lambda q, k, v: torch.cond(q.sum() > 0, attend, lambda q, k, v: v * 2, (q, k, v)), fused=1),
    Row("map", lambda q, k, v: map_over(lambda x, k, v: attend(x, k[0], v[0]), q, k, v), fused=1),
    Row("scan", lambda q, k, v: scan(lambda c, x: (c + attend(x, k[0], v[0]), c * 1), v[0] * 0, q)[0], fused=1),
    Row("while_loop", _while, fused=1),
    Row("vmap", lambda q, k, v: torch.vmap(attend)(q, k, v), fused=1),
    Row("gradient_inside", lambda q, k, v: torch.func.grad(lambda x: attend(x, k, v).sum())(q), words="Dynamo"),
    Row("chosen_backend", _chosen_backend, fused=1),
    Row("two_levels", _two_levels, fused=3),
)


# --- control flow -----------------------------------------------------------------------------------


def _branch_on_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v) if q.sum() > 0 else attend(q, k, v * 2)


def _branch_on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    if scores.max() > 0:
        scores = scores * 2
    return scores.softmax(-1) @ v


FLOW = (
    Row("branch_on_data", _branch_on_data, fused=1),
    Row("branch_on_scores", _branch_on_scores, words="no contraction"),
)

# --- element types, layouts, sizes ------------------------------------------------------------------

COMPLEX = tuple(torch.complex(x, x.flip(0)) for x in QKV)
with warnings.catch_warnings():  # quantised tensors are deprecated, compressed rows in beta: both are still met
    warnings.simplefilter("ignore")
    QUANTISED = torch.quantize_per_tensor(QKV[0], 0.1, 0, torch.qint8)
    COMPRESSED = torch.eye(4).to_sparse_csr()
JAGGED = torch.nested.nested_tensor([torch.randn(n, 4, 8, generator=GENERATOR) for n in (3, 5)], layout=torch.jagged)
SPARSE = torch.eye(4).to_sparse()
EMPTY = tuple(torch.zeros(0, 3, 5, 4) for _ in range(3))


def _jagged(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).values()


TYPES = (
    Row("complex_products", lambda q, k, v: (q @ k.mH).abs().softmax(-1) @ v.real, COMPLEX, words="floating point"),
    Row("quantised_input", lambda q, k, v: attend(q.dequantize(), k, v), (QUANTISED, *QKV[1:]), fused=1),
    Row("jagged", _jagged, (JAGGED,), words="left as it is"),
    Row("sparse_query", lambda s, v: (s @ v[0, 0, :4]).softmax(-1) @ v[0, 0, :4], (SPARSE, QKV[2]), words="layout"),
    Row("sparse_softmax", lambda s, v: torch.sparse.softmax(s, 1) @ v[0, 0, :4], (SPARSE, QKV[2])),
    Row("compressed_rows", lambda s, v: s @ v[0, 0, :4], (COMPRESSED, QKV[2])),
    Row("double", attend, tuple(x.double() for x in QKV), fused=1),
    Row("half", attend, tuple(x.half() for x in QKV), fused=1),
    Row("empty_batch", attend, EMPTY, fused=1),
    Row("no_queries", attend, (QKV[0][:, :, :0], *QKV[1:]), fused=1),
    Row("no_keys", attend, (QKV[0], QKV[1][:, :, :0], QKV[2][:, :, :0]), fused=1),
)

# --- what is given and what is returned -------------------------------------------------------------


def _deep(q: Tensor, k: Tensor, v: Tensor) -> Any:
    out = attend(q, k, v)
    return {"a": [out, (1, "x", None)], "b": {"c": q.shape[0], "d": out.mT}, "e": ()}


SHAPES = (
    Row("no_attention", lambda q, k, v: F.relu(q + k) * v),
    Row("nothing_returned", lambda q, k, v: None),
    Row("constants_returned", lambda q, k, v: (q + k, 1.5, "s", None)),
    Row("input_returned", lambda q, k, v: (v, attend(q, k, v)), fused=1),
    Row("deep_result", _deep, fused=1),
    Row("deep_input", lambda q, rest: attend(q, rest["k"], rest["more"][0]), (QKV[0], {"k": QKV[1], "more": [QKV[2], 3]}), fused=1),
)  # fmt: skip

ROWS = (*UNKNOWN, *NESTED, *FLOW, *TYPES, *SHAPES)
