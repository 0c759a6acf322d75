"""Loads of captured tensors in C++: what is free of the key is addressed once per row."""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.printer import Printer, Value
from attnopt.spec import AttentionSpec

C_TYPES = {
    "float32": "float",
    "float16": "half",
    "bfloat16": "bfloat",
    "float64": "double",
    "int64": "int64_t",
    "int32": "int32_t",
    "int16": "int16_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "bool": "uint8_t",
}


def expressions(spec: AttentionSpec) -> tuple[sp.Basic, ...]:
    """Everything in the spec that may load."""
    return tuple(spec.expressions.values())


def k_axes(spec: AttentionSpec) -> tuple[int | None, ...]:
    """For each capture the one axis whose index is `k` plus something free of it in every load that mentions k.

    None where there is no such axis. `CaptureLayout.k_stride` speaks of the stride along this axis.
    """
    spec = spec.canonical()
    found: dict[str, set[int | None]] = {}
    for load in ex.loads(*expressions(spec)):
        name, *indices = load.args
        carrying = [i for i, index in enumerate(indices) if ex.depends(index, ex.k)]
        if carrying:
            plain = len(carrying) == 1 and step(indices[carrying[0]]) == 1
            found.setdefault(name.name, set()).add(carrying[0] if plain else None)
    axes = {name: next(iter(seen)) if len(seen) == 1 else None for name, seen in found.items()}
    return tuple(axes.get(c.name) for c in spec.captures)


def step(index: sp.Expr) -> int | None:
    """The number c of an index `c*k + rest` with rest free of k; None for any other index."""
    index = sp.expand(index)
    c = index.coeff(ex.k, 1)
    return int(c) if c.is_Integer and not ex.depends(index - c * ex.k, ex.k) else None


@dataclass(frozen=True)
class CppLoader:
    """Prints loads for one spec and layout."""

    spec: AttentionSpec
    layout: Layout

    def __call__(self, printer: Printer, load: ex.Load) -> Value:
        name, *indices = load.args
        position = [c.name for c in self.spec.captures].index(name.name)
        about, axis = self.layout.captures[position], k_axes(self.spec)[position]
        kind = "f" if not isinstance(load, ex.IntLoad) else "l" if about.dtype == "int64" else "i"
        steps = [step(i) for i in indices]
        moving = [i for i, c in enumerate(steps) if c != 0]
        if about.k_stride == 0 and moving == [axis]:
            moving = []
        pointer = self._pointer(printer, name.name, indices, C_TYPES[about.dtype])
        if not moving:
            return self._scalar(printer, name.name, pointer, kind)
        if moving == [axis] and about.k_stride == 1 and not printer.guards:
            return self._contiguous(printer, name.name, pointer, kind)
        return self._gather(printer, name.name, pointer, [(i, indices[i]) for i in moving], kind)

    def _pointer(self, printer: Printer, name: str, indices: list[sp.Expr], c_type: str) -> str:
        """The address of the part that is free of k, named."""
        terms = [f"a.{name}"]
        for i, index in enumerate(indices):
            fixed = self._rest(index)
            if fixed != 0:
                terms.append(f"{printer.visit(fixed).code} * a.{name}_stride[{i}]")
        label = printer.fresh(f"{name}_row")
        line = f"const {c_type}* {label} = {' + '.join(terms)};"
        (printer.body if printer.in_body else printer.row).append(line)
        return label

    def _rest(self, index: sp.Expr) -> sp.Expr:
        """What is left of an index without its k part; nothing of one that is not affine in k."""
        c = step(index)
        return sp.S.Zero if c is None else sp.expand(index - c * ex.k)

    def _scalar(self, printer: Printer, name: str, pointer: str, kind: str) -> Value:
        read = f"read_{'f' if kind == 'f' else 'i'}(*{pointer})"
        if printer.guards:
            tests = " && ".join(f"any_({g.code})" for g in printer.guards)
            read = f"({tests}) ? {read} : 0"
        return printer.name(Value(read, kind), f"{name}_")

    def _contiguous(self, printer: Printer, name: str, pointer: str, kind: str) -> Value:
        code = f"load_{kind}<kRagged>({pointer} + (k0 + j), valid)"
        return printer.name(Value(code, kind, True), f"{name}_")

    def _gather(self, printer: Printer, name: str, pointer: str, moving: list[tuple[int, sp.Expr]], kind: str) -> Value:
        offsets = []
        for i, index in moving:
            c = step(index)
            if c is None:
                value = printer.cast(printer.visit(index), printer.visit(index).kind, True)
                place = value if value.code.isidentifier() else printer.name(value, "index")
                offsets.append(f"int64_t({place.code}[lane]) * a.{name}_stride[{i}]")
            else:
                factor = "" if c == 1 else f"{c} * "
                offsets.append(f"{factor}(k0 + j + lane) * a.{name}_stride[{i}]")
        tests = "".join(f" && lane_({g.code}, lane)" for g in printer.guards)
        valid = "(!kRagged || lane < valid)" if tests else "!kRagged || lane < valid"
        label = printer.fresh(f"{name}_")
        read = f"read_{'f' if kind == 'f' else 'i'}({pointer}[{' + '.join(offsets)}])"
        vector = printer.dialect.types[kind, True]
        printer.body.append(f"{vector} {label}{{}};")
        printer.body.append("for (int lane = 0; lane < kLanes; ++lane)")
        printer.body.append(f"  if ({valid}{tests}) {label}[lane] = {read};")
        return Value(label, kind, True)
