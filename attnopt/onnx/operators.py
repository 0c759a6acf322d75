"""The operators that a site can become, as rows of data, and what each of them cannot say.

The rows of `OPERATORS` are tried from the top; `tests/onnx/test_operators.py` runs every claim in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp
import torch
from torch import Tensor

from attnopt.onnx import emit
from attnopt.onnx.form import Form
from attnopt.spec import AttentionSpec, EmptyRow

REFERENCE = "reference graph"
OPSETS = (23, 25)


@dataclass(frozen=True)
class Shape:
    """What is known of a call's sizes for every run: whether `n_q == n_k`, and whether `n_q <= n_k`."""

    dtype: torch.dtype
    square: bool = False
    covered: bool = False


@dataclass(frozen=True)
class Operator:
    """One ONNX operator.

    Attributes:
        name: domain and name, as the report shows it.
        targets: the targets that it is for.
        dtypes: what ONNX Runtime has kernels for.
        refuses: why a form cannot be said by it; empty if it can.
        emit: builds the call; takes the operator's version.
        version: of its domain; None where it is the opset.
    """

    name: str
    targets: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    refuses: Callable[[AttentionSpec, Form, Shape], str]
    emit: Callable[[emit.Call, int], Tensor]
    version: int | None = None


def guarded(form: Form, shape: Shape) -> bool:
    """Whether some row may have no key that is kept."""
    return form.loads or not (form.first_kept or (form.own_kept and shape.covered))


def _standard(spec: AttentionSpec, form: Form, shape: Shape) -> str:
    return "" if form.sink is None else "ai.onnx.Attention has no sink"


def _multi_head(spec: AttentionSpec, form: Form, shape: Shape) -> str:
    if form.sink is not None or form.cap:
        return "MultiHeadAttention has neither sinks nor a soft-cap"
    if form.grouped and spec.heads.q != spec.heads.k:
        return "MultiHeadAttention has no grouped heads"
    if form.causal and not shape.square:
        return "MultiHeadAttention is causal only with as many keys as queries"
    if form.loads and (form.causal or spec.empty_row is not EmptyRow.NAN):
        return "MultiHeadAttention makes NaN of rows whose bias is -inf"
    return ""


def _group_query(spec: AttentionSpec, form: Form, shape: Shape) -> str:
    heads = spec.heads
    if not (form.causal or form.window or (form.sink is not None and form.keep == sp.true)):
        return "GroupQueryAttention is for causal attention, with or without a window, or for sinks"
    if form.bias != 0:
        return "GroupQueryAttention is not used with a bias"
    if not shape.square:
        return "GroupQueryAttention needs as many keys as queries"
    if not form.grouped or heads.d_qk != heads.d_v or heads.d_qk % 8:
        return "GroupQueryAttention needs grouped heads of one width, a multiple of 8"
    if form.sink is not None and form.sink_varies:
        return "GroupQueryAttention has one sink a head"
    return ""


OPERATORS = (
    Operator(
        "com.microsoft.GroupQueryAttention", ("ort",), (torch.float32, torch.float16), _group_query, emit.group_query, 1
    ),
    Operator("com.microsoft.MultiHeadAttention", ("ort",), (torch.float32,), _multi_head, emit.multi_head, 1),
    Operator("ai.onnx.Attention", ("onnx", "ort"), (torch.float32, torch.float16), _standard, emit.standard),
)


def candidates(spec: AttentionSpec, form: Form, shape: Shape, target: str) -> tuple[list[Operator], list[str]]:
    """The operators that say this attention, best first, and why the others do not."""
    found, reasons = [], []
    for operator in OPERATORS:
        if target in operator.targets:
            reason = operator.refuses(spec, form, shape)
            if shape.dtype not in operator.dtypes:
                kind = str(shape.dtype).removeprefix("torch.")
                reason = f"ONNX Runtime has no CPU kernel of {operator.name} for {kind}"
            if reason:
                reasons.append(reason)
            else:
                found.append(operator)
    return found, reasons
