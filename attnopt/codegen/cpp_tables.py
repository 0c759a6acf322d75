"""Gradients of what a score, a weight or a sink loads, in C++: summed by thread, then over threads in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.cpp_loads import step
from attnopt.codegen.derivative import derivative
from attnopt.codegen.printer import Printer
from attnopt.spec import AttentionSpec, Softmax


def conditions(expr: sp.Basic, load: ex.Load) -> list[sp.Basic] | None:
    """Conditions of which one holds wherever the load is taken; None where it is taken unconditionally."""
    found: list[sp.Basic] = []
    stack: list[tuple[sp.Basic, sp.Basic]] = [(expr, sp.true)]
    while stack:
        node, under = stack.pop()
        if node == load:
            if under == sp.true:
                return None
            found.append(under)
        elif isinstance(node, ex.Where):
            condition, x, y = node.args
            stack += [(condition, under), (x, sp.And(under, condition)), (y, sp.And(under, sp.Not(condition)))]
        else:
            stack += [(arg, under) for arg in node.args]
    return found


def unplaced(spec: AttentionSpec, learned: Sequence[str]) -> str | None:
    """Why there are no gradients of these captures; None if there are. `spec` is canonical."""
    parts = spec.expressions
    for load in ex.loads(*(e for name, e in parts.items() if name in ("gate", "divide"))):
        if load.args[0].name in learned:
            return f"the C++ kernel has no gradient of {load.args[0].name}, which a whole row is multiplied by"
    for load in ex.loads(parts["score"], parts["weight"]):
        if load.args[0].name in learned and load.has(ex.s):
            return f"the C++ kernel has no gradient of {load.args[0].name} at places that depend on scores"
        nested = any(index.has(ex.Load) for index in load.args[1:])
        if load.args[0].name in learned and nested and conditions(parts["score"], load) is not None:
            return (
                f"the C++ kernel has no gradient of {load.args[0].name}, whose places are looked up under a condition"
            )
    return None


def sum_type(spec: AttentionSpec, name: str) -> str:
    """`double` for the gradient of a capture whose elements may each be a long sum, else `float`."""
    parts = spec.canonical().expressions
    loads = [x for x in ex.loads(*parts.values()) if x.args[0].name == name]
    beside = all(_neighbours(x, conditions(parts["score"], x), conditions(parts["weight"], x)) for x in loads)
    return "float" if beside else "double"


def _neighbours(load: ex.Load, *guards: list[sp.Basic] | None) -> bool:
    """Whether a vector of keys loads a vector of neighbours, whatever the keys."""
    steps = [step(i) for i in load.args[1:]]
    return steps[-1:] == [1] and not any(steps[:-1]) and not any(guards)


@dataclass
class Tables:
    """Statements of a row: `row` before its keys, `body` for a vector of them, `end` after the last."""

    row: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    end: list[str] = field(default_factory=list)


def table_gradients(
    printer: Printer, score: sp.Expr, weight: sp.Expr, loads: Sequence[ex.Load], learned: Sequence[str]
) -> Tables:
    """What is added to the gradients of the learned tables, from `kept`, `p`, `dp` and `dlogit`."""
    tables = Tables()
    for number, load in enumerate(x for x in loads if x.args[0].name in learned):
        parts = []
        for expr, times in ((score, "dlogit"), (weight, "p * dp")):
            change = derivative(expr, load)
            if change != 0:
                factor = printer.cast(printer.visit(change), "f", True).code
                parts.append(times if change == 1 else f"{times} * {factor}")
        if not parts:
            continue
        kept = "kept"
        both = [conditions(score, load), conditions(weight, load)]
        guards = None if None in both else [c for cs in both for c in cs or ()]
        if guards:
            kept = f"kept & {printer.cast(printer.visit(sp.Or(*guards)), 'b', True).code}"
        part = f"select({kept}, {' + '.join(parts)}, VF{{}})"
        _place(printer, load, number, part, tables, _neighbours(load, *both))
    return tables


def _place(printer: Printer, load: ex.Load, number: int, part: str, tables: Tables, beside: bool) -> None:
    """Add `part` to the elements that the load reads."""
    name, *indices = load.args
    steps = [step(i) for i in indices]
    moving = [i for i, c in enumerate(steps) if c != 0]
    place = f"place{number}"
    terms = [f"t.grad_{name.name}"]
    for i, (index, c) in enumerate(zip(indices, steps, strict=True)):
        fixed = sp.S.Zero if c is None else sp.expand(index - c * ex.k)
        if fixed != 0:
            terms.append(f"{printer.visit(fixed).code} * a.grad_{name.name}_stride[{i}]")
    tables.row.append(f"auto* const {place} = {' + '.join(terms)};")
    if not moving:
        tables.row.append(f"VF total{number}{{}};")
        tables.body.append(f"total{number} += {part};")
        tables.end.append(f"*{place} += sum_lanes(total{number});")
    elif beside:
        tables.body.append(f"add_to<kRagged>({place} + (k0 + j), {part}, valid);")
    else:
        _scatter(printer, load, number, part, tables, moving)


def _scatter(printer: Printer, load: ex.Load, number: int, part: str, tables: Tables, moving: Sequence[int]) -> None:
    name, *indices = load.args
    offsets, same = [], ""
    for i in moving:
        c = step(indices[i])
        stride = f"a.grad_{name.name}_stride[{i}]"
        if c is not None:
            offsets.append(f"{'' if c == 1 else f'{c} * '}(k0 + j + lane) * {stride}")
            continue
        value = printer.visit(indices[i])
        value = printer.cast(value, value.kind, True)
        at = value if value.code.isidentifier() else printer.name(value, "at")
        offsets.append(f"int64_t({at.code}[lane]) * {stride}")
        if len(moving) == 1 and value.kind == "i":
            one = f"place{number}[{at.code}[0] * {stride}] += sum_lanes(part{number});"
            same = f"if (!kRagged && equal_lanes({at.code}) && !any_(part{number} == 0.0f)) {one}\nelse "
    lines = f"const VF part{number} = {part};\n{same}for (int lane = 0; lane < kLanes; ++lane)"
    # Where nothing is added the place may lie outside.
    test = f"if (part{number}[lane] != 0.0f)"
    tables.body += [*lines.split("\n"), f"  {test} place{number}[{' + '.join(offsets)}] += part{number}[lane];"]


def sink_gradient(spec: AttentionSpec, printer: Printer, learned: Sequence[str]) -> list[str]:
    """What a learned sink has of one row, from `lse` and `t.delta[q]`; on the first visit of a head's rows only."""
    sink = spec.normalizer.sink if isinstance(spec.normalizer, Softmax) else None
    lines: list[str] = []
    for load in ex.loads(sink) if sink is not None else ():
        name, *indices = load.args
        if name.name not in learned:
            continue
        factor = printer.cast(printer.visit(derivative(sink, load)), "f", False).code
        value = printer.cast(printer.visit(sink), "f", False).code
        place = [f"t.grad_{name.name}"]
        place += [f"{printer.visit(x).code} * a.grad_{name.name}_stride[{i}]" for i, x in enumerate(indices) if x != 0]
        lines.append(f"*({' + '.join(place)}) -= expf({value} - t.lse[q]) * t.delta[q] * {factor};")
    return [*printer.row, "if (first) {", *(f"  {line}" for line in lines), "}"] if lines else []


def copy_holes(spec: AttentionSpec, learned: Sequence[str]) -> dict[str, str]:
    """Text of `TABLES`, `COPIES`, `SLOT` and `JOIN`: where each thread's sums lie, and how they meet."""
    lines: dict[str, list[str]] = {"TABLES": [], "COPIES": ["int64_t copies = 0;"], "SLOT": [], "JOIN": []}
    for name in learned:
        grad, loads = f"grad_{name}", [x for x in ex.loads(*spec.expressions.values()) if x.args[0].name == name]
        exact = {c: all(c in load.args[1:] for load in loads) for c in (ex.b, ex.h, ex.k)}
        alone = ["threads == 1"]
        if exact[ex.h]:
            batch = "" if exact[ex.b] else " && w.step == a.n_b"
            alone.append(f"({'true' if exact[ex.k] else 'w.splits == 1'}{batch})")
        kind = sum_type(spec, name)
        lines["TABLES"].append(f"{kind}* {grad};")
        lines["COPIES"] += [
            f"// Whether no two threads add to one element of {name}.",
            f"const bool {grad}_alone = {' || '.join(alone)};",
            f"const int64_t {grad}_copy = copies;",
            f"copies += {grad}_alone ? 0 : (a.{grad}_size * (threads - 1) * int(sizeof({kind})) + 63) / 64 * 16;",
        ]
        lines["SLOT"] += [
            f"  {kind}* const {grad}_more = reinterpret_cast<{kind}*>(copied + {grad}_copy);",
            f"  t.{grad} = {grad}_alone || slot == 0 ? a.{grad} : {grad}_more + (slot - 1) * a.{grad}_size;",
        ]
        lines["JOIN"] += [
            f"for (int64_t slot = 1; slot < threads && !{grad}_alone; ++slot)",
            f"  for (int64_t i = 0; i < a.{grad}_size; ++i)",
            f"    a.{grad}[i] += reinterpret_cast<{kind}*>(copied + {grad}_copy)[(slot - 1) * a.{grad}_size + i];",
        ]
    indents = {"TABLES": "  ", "COPIES": "  ", "SLOT": "    ", "JOIN": "  "}
    return {hole: "\n".join(indents[hole] + line for line in found) for hole, found in lines.items()}
