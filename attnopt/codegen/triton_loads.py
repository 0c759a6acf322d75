"""Loads of captured tensors in Triton: offsets in 64 bits, and nothing is read outside a tensor."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_loads import k_axes, step
from attnopt.codegen.printer import Printer, Value
from attnopt.spec import AttentionSpec

# What a captured tensor may hold.
TRITON_TYPES = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float64": "*fp64",
    "int64": "*i64",
    "int32": "*i32",
    "int16": "*i16",
    "int8": "*i8",
    "uint8": "*u8",
    "bool": "*i1",
}


@dataclass(frozen=True)
class TritonLoader:
    """Prints loads for one spec and layout.

    Rows past the end repeat the last one, so that only keys past the end (`valid`, None in full tiles) and the guards
    of a `Where` keep a load inside its tensor.
    """

    spec: AttentionSpec
    layout: Layout

    @functools.cached_property
    def _axes(self) -> tuple[int | None, ...]:
        return k_axes(self.spec)

    def __call__(self, printer: Printer, load: ex.Load) -> Value:
        name, *indices = load.args
        position = [c.name for c in self.spec.captures].index(name.name)
        about, axis = self.layout.captures[position], self._axes[position]
        fixed, moving = [f"{name.name}_ptr"], []
        for i, index in enumerate(indices):
            stride = f"{name.name}_stride{i}"
            c = step(index)
            rest = sp.S.Zero if c is None else sp.expand(index - c * ex.k)
            if rest != 0:
                fixed.append(f"{self._wide(printer, rest)} * {stride}")
            if c is None:
                moving.append(f"{self._wide(printer, index)} * {stride}")
            elif c and not (i == axis and about.k_stride == 0):
                unit = i == axis and about.k_stride == 1
                factors = [*([] if c == 1 else [str(c)]), "k" if unit else "tl.cast(k, tl.int64)"]
                moving.append(" * ".join([*factors, *([] if unit else [stride])]))
        pointer = " + ".join(fixed)
        if moving:
            pointer = self._row_pointer(printer, name.name, pointer) if len(fixed) > 1 else pointer
            pointer = " + ".join([pointer, *moving])
        return self._read(printer, load, pointer, bool(moving), about.dtype)

    def _wide(self, printer: Printer, index: sp.Expr) -> str:
        """An index as 64 bits, so that its product with a stride is."""
        value = printer.visit(index)
        return value.code if index.is_Integer else printer.cast(value, "l", value.vector).code

    def _row_pointer(self, printer: Printer, name: str, pointer: str) -> str:
        """The part of an address that is free of k, named."""
        label = printer.fresh(f"{name}_row")
        (printer.body if printer.in_body else printer.row).append(f"{label} = {pointer}")
        return label

    def _read(self, printer: Printer, load: ex.Load, pointer: str, moving: bool, dtype: str) -> Value:
        kind = "f" if not isinstance(load, ex.IntLoad) else "l" if dtype == "int64" else "i"
        conditions = [g.code for g in printer.guards]
        if conditions:
            code = f"load_where({pointer}, {' & '.join(conditions)}, {'valid' if moving else 'None'})"
        else:
            code = f"load_keys({pointer}, valid)" if moving else f"tl.load({pointer})"
        wanted = {"f": "float32", "i": "int32", "l": "int64"}[kind]
        code = code if dtype == wanted else f"tl.cast({code}, tl.{wanted})"
        return printer.name(Value(code, kind, moving or printer.in_body), f"{load.args[0].name}_")
