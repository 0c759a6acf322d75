"""Gradients of tables: summed over what a load does not depend on, then added to its place."""

from __future__ import annotations

from attnopt.codegen.triton_backward import backward
from tests.codegen.test_triton import layout
from tests.specs import case


def test_tables_are_reduced_over_what_they_do_not_depend_on() -> None:
    for name, table, text in (
        ("bias", "bias", "add_where(grad_bias_ptr"),
        ("alibi", "slope", "tl.atomic_add(grad_slope_ptr"),
        ("sink", "sink", "tl.sum(-p_sink * delta)"),
    ):
        spec = case(name).spec.canonical()
        assert text in backward(spec, layout(spec), (table,))[2][1], name
        assert f"grad_{table}" not in backward(spec, layout(spec), ())[2][1], name
