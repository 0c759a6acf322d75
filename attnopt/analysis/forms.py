"""What kind of attention a spec is, in a word or two. Free of torch."""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.spec import AttentionSpec, Mixed, Pointwise


def form(spec: AttentionSpec) -> str:
    """The name of the attention's form: `softmax`, `sigmoid`, `linear`, `differential`, `mixture of heads`..."""
    if spec.merge:
        return _sum(spec)
    if isinstance(spec.normalizer, Pointwise):
        return _pointwise(spec)
    if isinstance(spec.normalizer, Mixed):
        return "softmax near, linear beyond"
    if spec.weight.has(sp.sign):
        return "signed"
    return "mixture of heads" if _routed(spec.gate) else "softmax"


def _sum(spec: AttentionSpec) -> str:
    gates = [term.gate for term in spec.terms]
    if any(gate.could_extract_minus_sign() for gate in gates):
        return "differential"
    if all(gate.is_number for gate in gates) and sum(gates) == 1:
        return "average"
    return "decoupled"


def _routed(gate: sp.Expr) -> bool:
    """Whether data weigh each head of each query."""
    return any(ex.depends(load, ex.h) and ex.depends(load, ex.q) for load in gate.atoms(ex.Load))


def _pointwise(spec: AttentionSpec) -> str:
    found = linear_form(spec)
    if found is not None:
        return "linear" if found.rate == 0 and found.line is None else "linear with decay"
    core = sp.Mul(*[f for f in sp.Mul.make_args(spec.score) if f.has(ex.s)])
    return next((name for name, matches in _FUNCTIONS if matches(core)), "pointwise")


def _is_sigmoid(core: sp.Expr) -> bool:
    return isinstance(core, sp.Pow) and core.exp == -1 and core.base.has(sp.exp)


def _is_relu(core: sp.Expr) -> bool:
    return isinstance(core, ex.Maximum) and sp.S.Zero in core.args


def _is_silu(core: sp.Expr) -> bool:
    return isinstance(core, sp.Mul) and any(map(_is_sigmoid, core.args)) and not core.has(sp.tanh, sp.erf)


def _is_softplus(core: sp.Expr) -> bool:
    terms = sp.Add.make_args(core)
    return len(terms) == 2 and any(map(_is_relu, terms)) and any(isinstance(t, sp.log) for t in terms)


# In this order: a later test may hold for what an earlier one names.
_FUNCTIONS: tuple[tuple[str, Callable[[sp.Expr], bool]], ...] = (
    ("bilinear", lambda core: core == ex.s),
    ("sigmoid", _is_sigmoid),
    ("relu", _is_relu),
    ("squared relu", lambda core: isinstance(core, sp.Pow) and core.exp == 2 and _is_relu(core.base)),
    ("softplus", _is_softplus),
    ("tanh", lambda core: isinstance(core, sp.tanh)),
    ("silu", _is_silu),
    ("gelu", lambda core: core.has(sp.erf) or (core.has(sp.tanh) and isinstance(core, sp.Mul))),
    ("exponential", lambda core: isinstance(core, sp.exp)),
    ("signed", lambda core: core.has(sp.sign)),
)
