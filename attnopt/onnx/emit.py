"""An attention as torch operators that the exporter turns into one ONNX operator, with its mask built around it.

What is proven of the operators, against the installed ONNX Runtime, stands in tests/onnx/test_emit.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp
import torch
from torch import Tensor

from attnopt.onnx.form import Form
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.reference import Sample, _scope, _without_scores
from attnopt.spec import AttentionSpec, EmptyRow

# ONNX Runtime takes the lowest float of all for -inf. A key that is masked softly gets this, which it does not.
LOW = -3.4e38


@dataclass(frozen=True)
class Call:
    """The operands of one call: `q [B, Hq, n_q, d_qk]`, `k [B, Hk, n_k, d_qk]`, `v [B, Hv, n_k, d_v]`, and its spec."""

    spec: AttentionSpec
    form: Form
    q: Tensor
    k: Tensor
    v: Tensor
    scope: Scope
    guarded: bool

    @staticmethod
    def make(
        spec: AttentionSpec, form: Form, tensors: Sequence[Tensor], captures: Sequence[Tensor], scalars: Sequence[int],
        guarded: bool,
    ) -> Call:  # fmt: skip
        """The call with its queries multiplied by the factor, and heads expanded where ONNX could not share them."""
        q, k, v = tensors
        scope = _without_scores(_scope(spec, q, k, captures, scalars, Sample(), torch.float32))
        if form.factor != 1:
            q = q * evaluate(form.factor, scope).to(q.dtype)
        if not form.grouped:
            k, v = _expanded(k, spec.heads.k_map), _expanded(v, spec.heads.v_map)
        return Call(spec, form, q, k, v, scope, guarded)

    @property
    def sizes(self) -> tuple[int, int]:
        """`n_q, n_k`."""
        return self.q.shape[2], self.k.shape[2]

    def keep(self) -> Tensor | None:
        """The mask as booleans that broadcast to `[B, Hq, n_q, n_k]`; None where every key is kept."""
        return None if self.form.keep == sp.true else evaluate(self.form.keep, self.scope)

    def bias(self) -> Tensor | None:
        """What is added to the scores, in fp32; None for nothing."""
        return None if self.form.bias == 0 else evaluate(self.form.bias, self.scope).to(torch.float32)

    def whole(self, mask: Tensor) -> Tensor:
        """A mask whose last two dimensions are those of the scores; batch and heads stay broadcast."""
        n_q, n_k = self.sizes
        return mask.expand(mask.shape[0], mask.shape[1], n_q, n_k)

    def finish(self, out: Tensor, empty: Tensor | None = None) -> Tensor:
        """The result with empty rows filled, the gate applied, and zeros in the rows that are not computed."""
        if empty is not None:
            fill = {EmptyRow.ZERO: 0.0, EmptyRow.NAN: torch.nan}.get(self.spec.empty_row)
            mean = _heads(self.v, out.shape[1]).mean(-2, keepdim=True) if fill is None else torch.full_like(out, fill)
            out = torch.where(empty, mean, out)
        out = out if self.spec.gate == 1 else out * evaluate(self.spec.gate, self.scope).to(out.dtype)
        return out if self.spec.rows == sp.true else torch.where(evaluate(self.spec.rows, self.scope), out, 0.0)


def standard(call: Call, version: int) -> Tensor:
    """`ai.onnx.Attention`: a mask of booleans or floats, both heads and batch broadcast; empty rows yield zeros."""
    form, policy = call.form, call.spec.empty_row
    attributes: dict[str, float | int] = {"scale": form.scale}
    if form.cap:
        attributes["softcap"] = form.cap
    causal = form.causal and not (call.guarded and policy is not EmptyRow.ZERO)
    if causal:
        attributes["is_causal"] = 1
    soft = call.guarded and policy is EmptyRow.UNIFORM and not form.loads
    keep, bias = None if causal else call.keep(), call.bias()
    mask = _joined(keep, bias, LOW if soft else -torch.inf, soft, form.loads)
    empty = None
    if mask is not None:
        if call.guarded and policy is not EmptyRow.ZERO and not soft:
            seen = mask if mask.dtype == torch.bool else mask > -torch.inf
            empty = ~seen.any(-1, keepdim=True)
        mask = call.whole(mask if mask.dtype == torch.bool else mask.to(call.q.dtype))
    out = _symbolic("Attention", (call.q, call.k, call.v, mask), attributes, call, _result(call), version)
    return call.finish(out, empty)


def multi_head(call: Call, version: int) -> Tensor:
    """`com.microsoft.MultiHeadAttention`: equal heads, 3-D operands, a bias of floats; -inf alone in a row is NaN."""
    form, policy = call.form, call.spec.empty_row
    attributes: dict[str, float | int] = {"num_heads": call.spec.heads.q, "scale": form.scale}
    if form.causal:
        attributes |= {"unidirectional": 1, "mask_filter_value": LOW}
    keep, bias = None if form.causal else call.keep(), call.bias()
    mask, empty = _joined(keep, bias, -torch.inf if form.loads else LOW, True, False), None
    if call.guarded and policy is not EmptyRow.UNIFORM and keep is not None and not form.loads:
        empty = ~keep.any(-1, keepdim=True)
    mask = None if mask is None else call.whole(mask.to(call.q.dtype))
    operands = (*map(_folded, (call.q, call.k, call.v)), None, None, mask)
    out = _symbolic("com.microsoft::MultiHeadAttention", operands, attributes, call, _flat(call), version)
    return call.finish(_unfolded(out, call), empty)


def group_query(call: Call, version: int) -> Tensor:
    """`com.microsoft.GroupQueryAttention`: as many keys as queries, causal or not, a window, a soft-cap, sinks."""
    form, heads = call.form, call.spec.heads
    attributes: dict[str, float | int] = {"num_heads": heads.q, "kv_num_heads": heads.k, "scale": form.scale}
    attributes |= {"causal": int(form.keep != sp.true), "softcap": form.cap}
    if form.window:
        attributes["local_window_size"] = form.window
    n_k = call.sizes[1]
    last = torch.full((call.q.shape[0],), n_k - 1, dtype=torch.int32)
    total = torch.full((), n_k, dtype=torch.int32)
    operands: list[Tensor | None] = [*map(_folded, (call.q, call.k, call.v)), None, None, last, total]
    if form.sink is not None:
        sink = evaluate(form.sink, call.scope).to(call.q.dtype).reshape(-1).expand(heads.q)
        operands += [None, None, None, None, sink]
    shapes = [_flat(call), call.k.shape, call.v.shape]
    name, types = "com.microsoft::GroupQueryAttention", [call.q.dtype] * 3
    out = torch.onnx.ops.symbolic_multi_out(
        name, operands, attributes, dtypes=types, shapes=shapes, version=version
    )[0]  # fmt: skip
    return call.finish(_unfolded(out, call))


def _joined(keep: Tensor | None, bias: Tensor | None, fill: float, soft: bool, loads: bool) -> Tensor | None:
    """Mask and bias as one tensor: booleans where they say it, else floats with `fill` where no key is kept."""
    if bias is not None and loads:
        bias = torch.where(bias == -torch.inf, bias, bias.clamp_min(LOW))
    if keep is None or (bias is None and not soft):
        return bias if keep is None else keep
    none = torch.zeros((), dtype=torch.float32) if bias is None else bias
    return torch.where(keep, none, torch.tensor(fill, dtype=torch.float32))


def _symbolic(
    name: str, operands: Sequence[Tensor | None], attributes: dict[str, float | int], call: Call,
    shape: Sequence[int], version: int,
) -> Tensor:  # fmt: skip
    return torch.onnx.ops.symbolic(name, operands, attributes, dtype=call.q.dtype, shape=shape, version=version)


def _result(call: Call) -> tuple[int, ...]:
    return (*call.q.shape[:3], call.v.shape[3])


def _flat(call: Call) -> tuple[int, ...]:
    """The shape of a result whose heads are folded into its last dimension."""
    return (call.q.shape[0], call.q.shape[2], call.q.shape[1] * call.v.shape[3])


def _folded(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _unfolded(x: Tensor, call: Call) -> Tensor:
    return x.unflatten(-1, (call.spec.heads.q, call.v.shape[3])).transpose(1, 2)


def _expanded(x: Tensor, table: tuple[int, ...]) -> Tensor:
    if table == tuple(range(x.shape[1])):
        return x
    return x.expand(-1, len(table), -1, -1) if x.shape[1] == 1 else x.index_select(1, torch.tensor(table))


def _heads(v: Tensor, count: int) -> Tensor:
    return v if v.shape[1] == count else v.repeat_interleave(count // v.shape[1], 1)
