"""The calls of `attnopt::attention` in a lowered graph as modules: recorded, then traced as ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnopt import expr as ex
from attnopt.graph import value
from attnopt.nested import everywhere
from attnopt.onnx import choice, emit
from attnopt.onnx.form import Form, always, form_of
from attnopt.onnx.operators import REFERENCE, Operator, Shape, candidates, guarded
from attnopt.runtime.reference import reference
from attnopt.runtime.validate import Verdict
from attnopt.spec import AttentionSpec

_OPERATOR = torch.ops.attnopt.attention.default


@dataclass(frozen=True)
class Operands:
    """The operands of one call."""

    tensors: tuple[Tensor, Tensor, Tensor]
    captures: tuple[Tensor, ...]
    scalars: tuple[int, ...]


class Attention(nn.Module):
    """One call: the reference in eager PyTorch, and what `operator` emits where it is traced.

    Attributes:
        anchor: name of the site that the call belongs to.
        operator: what it becomes; None is the reference graph. `reasons` say why no other.
        seen: the operands of the last eager call. `verdict`: how the operator did on them.
    """

    def __init__(self, spec: AttentionSpec, anchor: str, shape: Shape, target: str, opset: int) -> None:
        super().__init__()
        self.spec, self.anchor, self.opset, self.shape = spec, anchor, opset, shape
        form = chosen_form(spec)
        self.form: Form | None = None if isinstance(form, str) else form
        self.reasons = [form] if isinstance(form, str) else []
        self.waiting: list[Operator] = []
        if self.form is not None:
            self.waiting, self.reasons = candidates(choice.as_mask(spec), self.form, shape, target)
        self.operator: Operator | None = None
        self.seen: Operands | None = None
        self.verdict: Verdict | None = None
        self.next()

    def next(self, reason: str = "") -> None:
        """Take the next operator that says this attention, because of what was wrong with the present one."""
        if reason and self.operator is not None:
            self.reasons.append(f"{self.operator.name}: {reason}")
        self.operator = self.waiting.pop(0) if self.waiting else None

    @property
    def kernel(self) -> str:
        """What the report calls it."""
        if self.operator is None:
            return REFERENCE
        return self.operator.name + ("" if self.operator.version else f"-{self.opset}")

    @property
    def group(self) -> tuple[Any, ...]:
        """Calls with the same group are the same to ONNX Runtime."""
        assert self.seen is not None
        shapes = tuple(tuple(t.shape) for t in (*self.seen.tensors, *self.seen.captures))
        return (self.spec.key, self.shape, shapes, self.seen.scalars, self.kernel)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], spec: str
    ) -> tuple[Tensor, Tensor]:
        """As `attnopt::attention`."""
        tensors = (q, k, v)
        if not torch.compiler.is_exporting():
            self.seen = Operands(tensors, tuple(captures), tuple(scalars))
        spec_now = self.spec
        if torch.compiler.is_exporting():
            spec_now, captures = choice.operands(self.spec, q, k, captures, scalars)
        if not torch.compiler.is_exporting() or self.operator is None or self.form is None:
            out, lse = reference(spec_now, *tensors, captures, scalars)
            return out, lse if "lse" in self.spec.returns else lse.new_empty(0)
        unsure = guarded(self.form, self.shape)
        call = emit.Call.make(spec_now, self.form, tensors, captures, scalars, unsure)
        out = self.operator.emit(call, self.operator.version or self.opset)
        return out, out.new_empty(0, dtype=torch.float32)


def chosen_form(spec: AttentionSpec) -> Form | str:
    """The form of the spec with its choice of blocks as a mask; a query's own block is always among them."""
    form = form_of(choice.as_mask(spec))
    if isinstance(form, str) or spec.select is None or spec.select.own != ex.q:
        return form
    return replace(form, own_kept=always(spec.keep, ex.q))


def install(gm: fx.GraphModule, target: str, opset: int) -> list[Attention]:
    """Put an `Attention` in the place of every call, in the bodies of higher-order operators too; in place."""
    _propagate(gm)
    found: list[Attention] = []
    for module in (gm, *(body.gm for body in everywhere(gm))):
        for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target is _OPERATOR]:
            spec = AttentionSpec.parse(str(node.args[-1]))
            anchor = str(node.meta.get("attnopt_anchor", node.name))
            site = Attention(spec, anchor, _shape(node), target, opset)
            name = f"attention_{len(found)}"
            module.add_submodule(name, site)
            node.op, node.target = "call_module", name
            found.append(site)
        module.graph.lint()
        module.recompile()
    return found


def _propagate(gm: fx.GraphModule) -> None:
    """Give every node its fake value: lowering makes nodes without."""
    given = [value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    mode = next((x.fake_mode for x in given if isinstance(x, torch._subclasses.FakeTensor)), None)
    if mode is not None:
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*given)


def _shape(node: fx.Node) -> Shape:
    q, k = (value(x) for x in node.args[:2])
    if not isinstance(q, Tensor) or not isinstance(k, Tensor):
        return Shape(torch.float32)
    n_q, n_k = q.shape[2], k.shape[2]
    return Shape(q.dtype, statically_known_true(n_q == n_k), statically_known_true(n_q <= n_k))
