"""The kinds of Triton files: how each is made, its plans, and why there is none for a spec."""

from __future__ import annotations

from collections.abc import Callable

from attnopt.codegen import triton
from attnopt.codegen.base import Layout
from attnopt.codegen.triton import TritonKernel, supports_backward
from attnopt.codegen.triton_fit import fitting
from attnopt.codegen.triton_linear import emit_linear, linear_plans, supported_linear
from attnopt.codegen.triton_pages import no_forward
from attnopt.codegen.triton_plans import PLANS as SOFTMAX_PLANS
from attnopt.codegen.triton_plans import Chip, TritonPlan, backward_plans
from attnopt.codegen.triton_select import emit_select, select_plans, supported_select
from attnopt.codegen.triton_side import emit_side, supported_side
from attnopt.spec import AttentionSpec

EMIT: dict[str, Callable[[AttentionSpec, Layout, TritonPlan], TritonKernel]] = {
    **triton.EMIT,
    "linear": emit_linear,
    "select": emit_select,
    "side": emit_side,
}
PLANS: dict[str, Callable[[Chip, str, int, int], tuple[TritonPlan, ...]]] = {
    **SOFTMAX_PLANS,
    "linear": linear_plans,
    "select": select_plans,
    "side": backward_plans,  # the tiles are the same, with fewer products
}
# Kinds that not every spec with a forward kernel has.
MISSING: dict[str, Callable[[AttentionSpec, Layout], str | None]] = {
    "backward": supports_backward,
    "linear": supported_linear,
    "select": supported_select,
    "side": supported_side,
}


def proposed(kind: str, spec: AttentionSpec, chip: Chip, dtype: str) -> tuple[TritonPlan, ...]:
    """The plans of a kind that fit the chip with what the spec loads, the default first."""
    if kind in SOFTMAX_PLANS or kind == "side":
        return fitting(spec, chip, dtype, "backward" if kind == "side" else kind)
    return PLANS[kind](chip, dtype, spec.heads.d_qk, spec.heads.d_v)


def missing(kind: str, spec: AttentionSpec, layout: Layout) -> str | None:
    """Why a spec whose forward kernel there is has none of this kind, with these pages; None if it has one."""
    return no_forward(spec, layout) if kind == "forward" else MISSING[kind](spec, layout) if kind in MISSING else None
