"""The Triton rows of the printer, and the small functions that they name."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.printer import Dialect, Printer, Row, Value
from attnopt.errors import SpecError

# The largest number that Triton types as fp32, and the smallest normal one.
_LARGEST, _SMALLEST = (2.0 - 2.0**-23) * 2.0**127, 2.0**-126
# Coordinates are below 2^24 (the launcher checks), so this factor keeps a product within 32 bits.
_FACTOR = 64


def triton_float(value: float) -> str:
    """The shortest text that Triton reads as the same fp32 number; what fp32 holds as a subnormal is zero."""
    if abs(value) < _SMALLEST:
        return "0.0"
    for digits in range(1, 18):
        text = f"{value:.{digits}g}"
        if abs(float(text)) <= _LARGEST and struct.unpack("f", struct.pack("f", float(text)))[0] == value:
            break
    return text if any(c in text for c in ".e") else f"{text}.0"


TRITON = Dialect(
    rows={
        sp.Add: Row("({0} + {1})", fold=True),
        sp.Mul: Row("({0} * {1})", fold=True),
        ex.FloorDiv: Row("floor_div({0}, {1})"),
        ex.Mod: Row("floor_mod({0}, {1})"),
        ex.Maximum: Row("maximum({0}, {1})"),
        ex.Minimum: Row("minimum({0}, {1})"),
        ex.Trunc: Row("tl.cast({0}, tl.int32)", "f", "i"),
        ex.Snap: Row("((({0} / {1} + 12582912.0) - 12582912.0) * {1})", "f", "f"),  # 1.5 * 2**23 leaves no fraction
        sp.floor: Row("tl.cast(tl.floor({0}), tl.int32)", "f", "i"),
        sp.Abs: Row("tl.abs({0})"),
        sp.sign: Row("sign({0})"),
        sp.exp: Row("tl.exp({0})", "f", "f"),
        sp.log: Row("tl.log({0})", "f", "f"),
        sp.tanh: Row("tanh({0})", "f", "f"),
        sp.sin: Row("tl.sin({0})", "f", "f"),
        sp.cos: Row("tl.cos({0})", "f", "f"),
        sp.erf: Row("tl.erf({0})", "f", "f"),
        sp.Pow: Row("tl.exp2(tl.log2({0}) * {1})", "f", "f"),
        sp.And: Row("({0} & {1})", "b", "b", fold=True),
        sp.Or: Row("({0} | {1})", "b", "b", fold=True),
        sp.Not: Row("(~{0})", "b", "b"),
        sp.Ge: Row("({0} >= {1})", "*", "b"),
        sp.Gt: Row("({0} > {1})", "*", "b"),
        sp.Le: Row("({0} <= {1})", "*", "b"),
        sp.Lt: Row("({0} < {1})", "*", "b"),
        sp.Eq: Row("({0} == {1})", "*", "b"),
        sp.Ne: Row("({0} != {1})", "*", "b"),
    },
    casts={
        (source, target, vector): f"tl.cast({{0}}, tl.{name})"
        for vector in (False, True)
        for target, name in (("i", "int32"), ("l", "int64"), ("f", "float32"))
        for source in "bil"[: "bilf".index(target)]
    },
    splats=dict.fromkeys("bilf", "{0}"),  # values of different ranks meet by broadcasting
    types={(kind, vector): "" for kind in "bilf" for vector in (False, True)},
    infinity='float("inf")',
    true="True",
    false="False",
    statement="{name} = {code}",
    select="tl.where({0}, {1}, {2})",
    number=triton_float,
    forms={
        sp.Integer(2): "square({0})",
        sp.S.NegativeOne: "(1.0 / {0})",
        sp.S.Half: "tl.sqrt({0})",
        -sp.S.Half: "(1.0 / tl.sqrt({0}))",
        "n": "power({0}, @)",
    },
)


@dataclass
class TritonPrinter(Printer):
    """Integers are of 32 bits where they fit: a product of two coordinates is taken in 64."""

    def _apply(self, row: Row, values: list[Value]) -> Value:
        kinds = {v.kind for v in values}
        if row in (self.dialect.rows[ex.FloorDiv], self.dialect.rows[ex.Mod]) and "f" in kinds:
            raise SpecError("the Triton kernel has no remainder of floats.")
        if row is self.dialect.rows[sp.Mul] and kinds <= {"b", "i"} and not any(map(_small, values)):
            values = [self.cast(v, "l", v.vector) for v in values]
        return super()._apply(row, values)

    def cast(self, value: Value, kind: str, vector: bool) -> Value:
        """A literal integer needs no cast: it takes the kind of what it meets."""
        if value.code.strip("()-").isdecimal() and kind in "lf":
            code = value.code if kind == "l" else self.literal(sp.Integer(value.code.strip("()")))
            return Value(code, kind, value.vector)
        return super().cast(value, kind, vector)


def _small(value: Value) -> bool:
    digits = value.code.strip("()-")
    return digits.isdecimal() and int(digits) <= _FACTOR


_HELPERS = {
    "floor_div": '''\
@triton.jit
def floor_div(x, y):
    """Integer division that rounds down, whichever way `//` rounds."""
    quotient = x // y
    rest = x - quotient * y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1, quotient)
''',
    "floor_mod": '''\
@triton.jit
def floor_mod(x, y):
    """Remainder with the sign of the divisor."""
    return x - floor_div(x, y) * y
''',
    "maximum": '''\
@triton.jit
def maximum(x, y):
    """The larger of two numbers; NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
''',
    "minimum": '''\
@triton.jit
def minimum(x, y):
    """The smaller of two numbers; NaN if one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
''',
    "sign": '''\
@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0, 1, 0) - tl.where(x < 0, 1, 0)
''',
    "square": '''\
@triton.jit
def square(x):
    """x times x."""
    return x * x
''',
    "power": '''\
@triton.jit
def power(x, n: tl.constexpr):
    """x to the n, for any integer n."""
    result = x
    for _ in tl.static_range(1, n if n > 0 else -n):
        result = result * x
    return result if n > 0 else 1.0 / result
''',
    "tanh": '''\
@triton.jit
def tanh(x):
    """Hyperbolic tangent: a polynomial where the exponentials would cancel, exponentials elsewhere."""
    size = tl.abs(x)
    square = x * x
    tail = tl.exp2(-2.8853900817779268 * size)
    large = (1.0 - tail) / (1.0 + tail)
    series = -0.006647791713 * square + 0.02129816264
    series = series * square - 0.05389922485
    series = series * square + 0.1333296448
    series = series * square - 0.3333332837
    small = size + size * square * series
    return tl.where(x < 0, -1.0, 1.0) * tl.where(size < 0.5, small, large)
''',
    "load_keys": '''\
@triton.jit
def load_keys(pointer, valid):
    """Elements of keys; 0 for keys past the end. `valid` is None where there are none."""
    if valid is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=valid, other=0)
''',
    "page_of": '''\
@triton.jit
def page_of(slots, k, n_k, n_pages, stride):
    """The pages that hold keys; one of the pool for keys past the end, whatever the table says there."""
    page = tl.load(slots + k // PAGE * stride, mask=k < n_k, other=0)
    return tl.cast(tl.minimum(tl.maximum(page, 0), n_pages - 1), tl.int64)
''',
    "add_where": '''\
@triton.jit
def add_where(pointer, value, condition):
    """Add values to what many programs share, where the condition holds."""
    pointer, value = tl.broadcast(pointer, value)
    pointer, condition = tl.broadcast(pointer, condition)
    tl.atomic_add(pointer, value, mask=condition, sem="relaxed")
''',
    "load_where": '''\
@triton.jit
def load_where(pointer, condition, valid):
    """An element where the condition holds, else 0; nothing is read elsewhere."""
    if valid is not None:
        condition = condition & valid
    pointer, condition = tl.broadcast(pointer, condition)
    return tl.load(pointer, mask=condition, other=0)
''',
}


def helpers(text: str) -> Iterable[str]:
    """The small functions that `text` calls, and those that they call, in the order of the list above."""
    names = set(re.findall(r"(?<![.\w])(\w+)\(", text))
    if "floor_mod" in names:
        names.add("floor_div")
    return [body for name, body in _HELPERS.items() if name in names]
