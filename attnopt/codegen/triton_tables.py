"""Gradients of what a score or a sink loads, in Triton: summed as far as the load allows, then added atomically."""

from __future__ import annotations

from collections.abc import Sequence

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.derivative import derivative
from attnopt.codegen.printer import Printer
from attnopt.codegen.triton_parts import Parts, printer_of
from attnopt.spec import AttentionSpec, Softmax

# Whether a row has any key.
SOME_KEY = 'row_lse > float("-inf")'


def _place(printer: Printer, load: ex.Load) -> str:
    """The address of a load's element in the gradient of its tensor."""
    name, *indices = load.args
    terms = [f"grad_{name.name}_ptr"]
    for i, index in enumerate(indices):
        value = printer.visit(index)
        code = value.code if index.is_Integer else printer.cast(value, "l", value.vector).code
        terms.append(f"{code} * grad_{name.name}_stride{i}")
    return " + ".join(terms)


def table_gradients(made: Parts, learned: Sequence[str]) -> list[str]:
    """Add the gradient of every load of a learned table to its place, summed over what the load does not depend on."""
    lines: list[str] = []
    for load in ex.loads(made.spec.score):
        if load.args[0].name not in learned:
            continue
        printer = made.printer.scope()
        factor = printer.cast(printer.visit(derivative(made.spec.score, load)), "f", True).code
        place = _place(printer, load)
        lines += [*printer.body, f"part = tl.where(kept, dlogit * {factor}, 0.0)"]
        if ex.depends(load, ex.k) and ex.depends(load, ex.q):
            lines.append(f"add_where({place}, part, kept & (k < n_k))")
        elif ex.depends(load, ex.k):
            lines.append(f"add_where({place}, tl.sum(part, 0, keep_dims=True), k < n_k)")
        elif ex.depends(load, ex.q):
            lines.append(f"add_where({place}, tl.sum(part, 1, keep_dims=True), rows_inside)")
        else:
            lines.append(f'tl.atomic_add({place}, tl.sum(part), sem="relaxed")')
    return lines


def sink_gradient(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> list[str]:
    """Add what a learned sink has of each row to its place."""
    sink = spec.normalizer.sink if isinstance(spec.normalizer, Softmax) else None
    if not isinstance(sink, ex.Load) or sink.args[0].name not in learned:
        return []
    printer = printer_of(spec, layout)
    value = printer.visit(sink).code
    place = _place(printer, sink)
    return [
        *printer.row,
        f"p_sink = tl.where(rows_inside & ({SOME_KEY}), tl.exp2(({value} - row_lse) * LOG2E), 0.0)",
        f'tl.atomic_add({place}, tl.sum(-p_sink * delta), sem="relaxed")',
    ]
