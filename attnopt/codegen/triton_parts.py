"""The spec's own parts of a Triton kernel: what a tile of keys does, what starts a row and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis import tiles
from attnopt.codegen.base import Layout
from attnopt.codegen.printer import Value
from attnopt.codegen.triton_dialect import TRITON, TritonPrinter
from attnopt.codegen.triton_loads import TritonLoader
from attnopt.codegen.triton_pages import values_of
from attnopt.codegen.triton_rows import logged, spent, state_of
from attnopt.codegen.triton_text import full, indent
from attnopt.spec import AttentionSpec, EmptyRow, Pointwise, Softmax

ELEMENTS = {"float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16"}
_SCALARS = {x: Value(x.name, "i") for x in (ex.b, ex.h, ex.q, ex.n_b, ex.n_q, ex.n_k, tiles.q0, tiles.q1)}
_SCALARS |= {ex.n_h: Value("HEADS", "i"), ex.t: Value("total", "f"), ex.a: Value("total_abs", "f")}
_NOTHING = 'float("-inf")'


def printer_of(spec: AttentionSpec, layout: Layout) -> TritonPrinter:
    """A printer for the expressions of a spec: `q` and `h` are values of a row, `k` and `s` of a tile."""
    scalars = {ex.scalar(name): Value(f"{name}_value", "i") for name in spec.scalars}
    vectors = {ex.k: Value("k", "i", True), ex.s: Value("s", "f", True)}
    return TritonPrinter(TRITON, {**_SCALARS, **scalars, **vectors}, TritonLoader(spec, layout))


@dataclass
class Parts:
    """Lines of text: `rows` before the tiles of keys, `tile` is one of them, `start` begins the state of a row,
    `finish` makes `result` and `lse` of it.

    `state` names what a tile updates beside `acc`. `ends` are the key ranges `lo, hi, full_lo, full_hi` of queries
    `[q0, q1)`; `ranges` are the statements that they need.
    """

    spec: AttentionSpec
    layout: Layout
    printer: TritonPrinter
    split: tiles.Tiles
    ranges: list[str] = field(default_factory=list)
    ends: tuple[str, ...] = ()
    rows: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    tile: list[str] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    state: tuple[str, ...] = ("m", "l")

    def said(self, make: Callable[[Parts], None]) -> list[str]:
        """What the printer says once per row while `make` runs."""
        mark = len(self.printer.row)
        make(self)
        return self.printer.row[mark:]


def folded_scale(spec: AttentionSpec) -> sp.Expr | None:
    """The number c if the logits are c*s, c above zero, and nothing but keys makes a row's sum; else None.

    Then c*log2(e) is one factor. Any other logit may be as large as fp32 goes, where that factor would overflow. A
    maximum that others measure logits from is a logit, to the last digit.
    """
    c = spec.score.coeff(ex.s, 1)
    plain = isinstance(spec.normalizer, Softmax) and spec.normalizer.sink is None and "max" not in spec.returns
    return c if plain and c.is_number and c.is_finite and c > 0 and spec.score == c * ex.s else None


def parts(spec: AttentionSpec, layout: Layout, listed: bool = False) -> Parts:
    """The parts of a canonical spec. Raises `SpecError` for what cannot be printed.

    `listed`: a tile that is not MASKED is kept whole, so that all of the mask belongs to the others.
    """
    split = tiles.analyse(spec.keep)
    split = tiles.Tiles(split.bounds, spec.keep, sp.true) if listed else split
    made = Parts(spec, layout, printer_of(spec, layout), split)
    made.ranges = made.said(_ends)
    made.rows = made.said(_pointwise if isinstance(spec.normalizer, Pointwise) else _softmax)
    _both_ends(made)
    return made


def score_parts(spec: AttentionSpec, layout: Layout) -> Parts:
    """The key ranges, and a tile that makes `logit` of `s`, for kernels that have the lse already."""
    made = Parts(spec, layout, printer_of(spec, layout), tiles.analyse(spec.keep))
    made.ranges = made.said(_ends)
    made.tile = _logits(made, spec.score, "logit", _NOTHING)
    return made


def kept_lines(made: Parts) -> list[str]:
    """`kept`: 1 where a key is kept, else 0."""
    return _logits(made, sp.S.One, "kept", "0.0")


def row_ends(spec: AttentionSpec, layout: Layout) -> Parts:
    """`start` and `finish` alone, for a kernel that visits no keys."""
    made = Parts(spec, layout, printer_of(spec, layout), tiles.analyse(sp.true))
    sums = _sums(spec.normalizer) if isinstance(spec.normalizer, Pointwise) else None
    made.state = state_of(spec) if sums is None else tuple(name for name, _ in sums)
    _both_ends(made)
    return made


def _both_ends(made: Parts) -> None:
    made.start = [*made.said(_start), *made.start]
    made.finish = [*made.said(_finish), *made.finish]


def _ends(made: Parts) -> None:
    ends = tiles.key_ranges(made.split.bounds)
    made.ends = tuple("0" if _nothing(e) else made.printer.visit(e).code for e in ends)


def _nothing(end: sp.Expr) -> bool:
    """Whether the end of a range is certainly not above zero."""
    return end == 0 or (isinstance(end, ex.Minimum) and any(map(_nothing, end.args)))


def _logits(made: Parts, score: sp.Expr, name: str, nothing: str) -> list[str]:
    """The score as `name`, with `nothing` where a key is not kept."""
    printer, split = made.printer, made.split
    value = printer.cast(printer.visit(score), "f", True)
    whole = value.code if ex.depends(score, ex.s) else f"tl.zeros_like(s) + {value.code}"
    lines = [*printer.body, *([] if (name, whole) == ("s", "s") else [f"{name} = {whole}"])]
    block = printer.scope()
    test = "valid" if split.static == sp.true else f"{block.visit(split.static).code} & valid"
    lines += ["if MASKED:", *indent([*block.body, f"{name} = tl.where({test}, {name}, {nothing})"])]
    if split.residual != sp.true:
        block = printer.scope()
        test = block.visit(split.residual).code
        lines += [*block.body, f"{name} = tl.where({test}, {name}, {nothing})"]
    return lines


def _weights(made: Parts) -> list[str]:
    """The factor of the weights, and the product with the values."""
    lines = []
    if made.spec.weight != 1:
        block = made.printer.scope()
        factor = block.cast(block.visit(made.spec.weight), "f", True).code
        lines = [*block.body, f"p = p * {factor}"]
    weights = "p" if made.layout.dtype == "float32" else f"tl.cast(p, {ELEMENTS[made.layout.dtype]})"
    return [*lines, f"acc = tl.dot({weights}, values, acc{precision(made.layout)})"]


def _softmax(made: Parts) -> None:
    scale = folded_scale(made.spec)
    if scale is None:
        lines = _logits(made, made.spec.score, "logit", _NOTHING)
        top, away, unit = "tl.max(logit, 1, keep_dims=True)", "logit - shift", " * LOG2E"
        decay = "(m - shift) * LOG2E"
    else:  # masks on the raw scores: the factor comes with the exponential
        lines = _logits(made, ex.s, "s", _NOTHING)
        top, away, unit = "tl.max(s, 1, keep_dims=True) * SCALE_LOG2E", "s * SCALE_LOG2E - shift", ""
        decay = "m - shift"
    made.state = state_of(made.spec)
    made.tile = [
        *lines,
        f"m_next = tl.maximum(m, {top})",
        f"shift = tl.where(m_next == {_NOTHING}, 0.0, m_next)",
        f"p = tl.exp2({f'({away}){unit}' if unit else away})",
        f"decay = tl.exp2({decay})",
        *spent(made.spec, away),
        "l = l * decay + tl.sum(p, 1, keep_dims=True)",
        "m = m_next",
        "acc = acc * decay",
        *_weights(made),
    ]


def _start(made: Parts) -> None:
    """The state before any key."""
    normalizer = made.spec.normalizer
    if isinstance(normalizer, Pointwise):
        made.start = [f"{name} = " + full("0.0") for name in made.state]
    elif not isinstance(normalizer, Softmax) or normalizer.sink is None:
        made.start = empty_state(made.spec)
    else:
        sink = made.printer.cast(made.printer.visit(normalizer.sink), "f", False).code
        # The difference is NaN for a sink that is NaN or infinite, as a softmax over it would be.
        made.start = ["m = " + full("0.0") + f" + {sink}", f"l = tl.where(m == {_NOTHING}, 0.0, 1.0 + (m - m))"]
        made.start += [f"{name} = " + full("0.0") for name in made.state[2:]]


def empty_state(spec: AttentionSpec) -> list[str]:
    """The state of a softmax that nothing joined."""
    return [f"{name} = " + full(_NOTHING if name == "m" else "0.0") for name in state_of(spec)]


def _sums(normalizer: Pointwise) -> list[tuple[str, str]]:
    """The sums over a row's weights that its divisor mentions: name and summand."""
    sums = {ex.t: ("total", "p"), ex.a: ("total_abs", "tl.abs(p)")}
    return [names for symbol, names in sums.items() if ex.depends(normalizer.divide, symbol)]


def _pointwise(made: Parts) -> None:
    assert isinstance(made.spec.normalizer, Pointwise)
    used = _sums(made.spec.normalizer)
    made.state = tuple(name for name, _ in used)
    lines = _logits(made, made.spec.score, "p", "0.0")
    lines += [f"{name} += tl.sum({what}, 1, keep_dims=True)" for name, what in used]
    made.tile = [*lines, *_weights(made)]


def _finish(made: Parts) -> None:
    """`result [BLOCK_M, BLOCK_DV]` and side outputs of rows `[BLOCK_M, 1]` from the state."""
    spec, printer = made.spec, made.printer
    if isinstance(spec.normalizer, Pointwise):
        divide = printer.cast(printer.visit(spec.normalizer.divide), "f", False).code
        made.finish = ["result = acc" if spec.normalizer.divide == 1 else f"result = acc / {divide}"]
        log = f"tl.log(tl.abs({full('0.0')} + {divide}))"
    else:
        empty = _empty(spec, made.layout)
        made.finish = [f"empty = m == {_NOTHING}", "result = acc / tl.where(empty, 1.0, l)", *empty]
        log = "m + tl.log(l)" if folded_scale(spec) is None else "(m + tl.log2(l)) * LN2"
        log = f"tl.where(empty, {_NOTHING}, {log})"
    if spec.gate != 1:
        gate = printer.cast(printer.visit(spec.gate), "f", False).code
        made.finish.append(f"result = result * {gate}")
    made.finish += logged(spec, log, folded_scale(spec) is not None)


_MEAN = """\
mean = tl.zeros([1, BLOCK_DV], tl.float32)
if tl.max(tl.cast(empty, tl.int32)) > 0:
    for k0 in range(0, n_k, BLOCK_N):
        places = k0 + tl.arange(0, BLOCK_N)[:, None]
        inside = (places < n_k) & (dv[None, :] < D_V)
        values = tl.load(v_base + tl.cast(k0, tl.int64) * v_stride2 + v_offsets, mask=inside, other=0.0)
        mean += tl.sum(tl.cast(values, tl.float32), 0, keep_dims=True)
result = tl.where(empty, mean / n_k, result)"""


def _empty(spec: AttentionSpec, layout: Layout) -> list[str]:
    if spec.empty_row is EmptyRow.ZERO:
        return []
    if spec.empty_row is EmptyRow.NAN:
        return ['result = tl.where(empty, float("nan"), result)']
    lines = _MEAN.split("\n")
    return [*lines[:5], *indent(values_of("places", layout), 8), *lines[6:]] if layout.page else lines


def precision(layout: Layout) -> str:
    """The argument of a product that says how fp32 is multiplied; the others have one way."""
    return ", input_precision=FP32" if layout.dtype == "float32" else ""
