"""`AttentionSpec`: what an attention computes, and nothing about how. Free of torch."""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.normalizer import Mixed, Normalizer, Pointwise, Softmax, normalizer_from_json, normalizer_to_json
from attnopt.readable import show
from attnopt.returns import check
from attnopt.select import Select, select_from_json, select_to_json

__all__ = [
    "AttentionSpec", "Capture", "EmptyRow", "Heads", "Mixed", "Normalizer", "Pointwise", "Select", "Softmax",
]  # fmt: skip

VERSION = 2
# Text may ask for head tables; more heads than this are a mistake or an attack.
_MOST = 1 << 16


class EmptyRow(enum.Enum):
    """What a row yields when no key is kept: zeros, NaN, or the mean of all values."""

    ZERO = "zero"
    NAN = "nan"
    UNIFORM = "uniform"


@dataclass(frozen=True)
class Heads:
    """Head counts and widths. `k_map[h]` is the key head of query head h; `v_map` likewise for values."""

    q: int
    k: int
    v: int
    d_qk: int
    d_v: int
    k_map: tuple[int, ...] = ()
    v_map: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, count in (("k_map", self.k), ("v_map", self.v)):
            if not getattr(self, name) and count and self.q % count == 0:
                object.__setattr__(self, name, tuple(i // (self.q // count) for i in range(self.q)))

    def __str__(self) -> str:
        heads = f"{self.q} heads" if self.q == self.k == self.v else f"{self.q}/{self.k} heads"
        if self.k != self.v:
            heads = f"{self.q}/{self.k}/{self.v} heads"
        width = f"d={self.d_qk}" if self.d_qk == self.d_v else f"d={self.d_qk}/{self.d_v}"
        regular = Heads(self.q, self.k, self.v, self.d_qk, self.d_v)
        return f"{heads}, {width}" + ("" if regular == self else ", head table")


@dataclass(frozen=True)
class Capture:
    """A tensor that the expressions load. `shape` holds None where a size is known only at run time."""

    name: str
    kind: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class AttentionSpec:
    """The mathematics of one attention site.

    With `s = q[b,h,q,:] . k[b,k_map[h],k,:]` it computes `sum_k normalizer_k(score where keep) v[b,v_map[h],k,:]`.

    Attributes:
        heads: head counts, widths and head maps.
        score: logit as an expression in `s`, the coordinates `b, h, q, k`, sizes, scalars and loads.
        keep: boolean expression; True means that the query attends to the key.
        normalizer: how logits become weights.
        weight: factor of each weight after the normaliser, an expression like `score`.
        empty_row: the result of a row without any kept key under a softmax.
        gate: weight of a head's output, an expression in `b, h, q` and loads.
        rows: which rows are computed, a condition in `b, h, q` and loads; others are zero, of an lse of -inf.
        select: which blocks of keys an approximate site visits; None means all that `keep` allows.
        merge: further attentions whose results are added to this one's.
        dropout: probability of dropping a weight (training only).
        returns: side outputs, of `lse`, `entropy`, `max`, `log_sum`, `column_mass` and `weights` (`returns.py`).
        captures: the tensors that the expressions load.
        scalars: names of integers supplied at run time.
    """

    heads: Heads
    score: sp.Expr = ex.s
    keep: Boolean = sp.true
    normalizer: Normalizer = field(default_factory=Softmax)
    weight: sp.Expr = sp.S.One
    empty_row: EmptyRow = EmptyRow.NAN
    gate: sp.Expr = sp.S.One
    rows: Boolean = sp.true
    select: Select | None = None
    merge: tuple[AttentionSpec, ...] = ()
    dropout: float = 0.0
    returns: tuple[str, ...] = ()
    captures: tuple[Capture, ...] = ()
    scalars: tuple[str, ...] = ()

    def canonical(self) -> AttentionSpec:
        """The same mathematics in canonical expressions."""
        return replace(
            self, score=ex.canon(self.score), keep=ex.canon(self.keep), gate=ex.canon(self.gate),
            weight=ex.canon(self.weight), select=self.select and self.select.canonical(), rows=ex.canon(self.rows),
            merge=tuple(m.canonical() for m in self.merge),
        )  # fmt: skip

    @property
    def terms(self) -> tuple[AttentionSpec, ...]:
        """The attentions whose results are added up: this one without `merge`, then those of `merge`."""
        return (replace(self, merge=()), *self.merge) if self.merge else (self,)

    @property
    def expressions(self) -> dict[str, sp.Basic]:
        """Every expression by the name of its part; a normaliser's own among them."""
        own = {"score": self.score, "keep": self.keep, "gate": self.gate, "weight": self.weight}
        own |= {"rows": self.rows} if self.rows != sp.true else {}
        if self.select is not None and self.select.own is not None:
            own["own"] = self.select.own
        if isinstance(self.normalizer, Pointwise):
            return {**own, "divide": self.normalizer.divide}
        if isinstance(self.normalizer, Mixed):
            return {**own, "near": self.normalizer.near}
        return own if self.normalizer.sink is None else {**own, "sink": self.normalizer.sink}

    @cached_property
    def text(self) -> str:
        """Canonical JSON: equal mathematics in equal spelling gives equal text in every process."""
        return json.dumps(_to_json(self.canonical()), sort_keys=True, separators=(",", ":"))

    @cached_property
    def key(self) -> str:
        """sha256 of `text`, as hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.text)

    @staticmethod
    def parse(text: str) -> AttentionSpec:
        """The spec that `text` describes. Raises `SpecError` for anything else; evaluates nothing."""
        try:
            data = json.loads(text)
            spec = _from_json(data)
        except SpecError:
            raise
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, AttributeError) as error:
            raise SpecError(f"spec text is malformed: {type(error).__name__}: {error}.") from None
        spec.verify()
        return spec

    def verify(self) -> None:
        """Raise `SpecError` unless every part refers only to what exists and fits together."""
        _verify(self)

    def capture(self, name: str) -> Capture:
        """The capture of this name."""
        return next(c for c in self.captures if c.name == name)

    def __str__(self) -> str:
        parts = [f"{self.heads}", f"score {show(self.score)}"]
        if self.keep != sp.true:
            parts.append(f"keep {show(self.keep)} (empty row: {self.empty_row.value})")
        if str(self.normalizer):
            parts.append(str(self.normalizer))
        if self.weight != 1:
            parts.append(f"weight times {show(self.weight)}")
        if self.select is not None:
            parts.append(str(self.select))
        if self.gate != 1:
            parts.append(f"gate {show(self.gate)}")
        if self.rows != sp.true:
            parts.append(f"rows where {show(self.rows)}")
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}")
        if set(self.returns) - {"lse"}:
            parts.append(f"returns {', '.join(self.returns)}")
        return " + ".join(["; ".join(parts), *(f"({m})" for m in self.merge)])


def _to_json(spec: AttentionSpec) -> dict[str, Any]:
    heads = spec.heads
    more: dict[str, Any] = {} if spec.select is None else {"select": select_to_json(spec.select)}
    more |= {"rows": ex.to_tree(spec.rows)} if spec.rows != sp.true else {}
    return {
        **more,
        "version": VERSION,
        "heads": [heads.q, heads.k, heads.v, heads.d_qk, heads.d_v, list(heads.k_map), list(heads.v_map)],
        "score": ex.to_tree(spec.score),
        "keep": ex.to_tree(spec.keep),
        "normalizer": normalizer_to_json(spec.normalizer),
        "weight": ex.to_tree(spec.weight),
        "empty_row": spec.empty_row.value,
        "gate": ex.to_tree(spec.gate),
        "dropout": spec.dropout,
        "returns": list(spec.returns),
        "captures": [[c.name, c.kind, list(c.shape)] for c in spec.captures],
        "scalars": list(spec.scalars),
        "merge": [_to_json(m) for m in spec.merge],
    }


def _from_json(data: dict[str, Any]) -> AttentionSpec:
    if data["version"] != VERSION:
        raise SpecError(f"spec text is of version {data['version']!r}; this attnopt reads version {VERSION}.")
    n_q, n_k, n_v, d_qk, d_v, k_map, v_map = data["heads"]
    if not 0 < max(n_q, n_k, n_v, d_qk, d_v) <= _MOST:
        raise SpecError(f"head counts and widths must be positive and at most {_MOST}: {data['heads'][:5]}.")
    return AttentionSpec(
        heads=Heads(int(n_q), int(n_k), int(n_v), int(d_qk), int(d_v), tuple(map(int, k_map)), tuple(map(int, v_map))),
        score=ex.from_tree(data["score"]),
        keep=ex.from_tree(data["keep"]),
        normalizer=normalizer_from_json(data["normalizer"]),
        weight=ex.from_tree(data["weight"]),
        empty_row=EmptyRow(data["empty_row"]),
        gate=ex.from_tree(data["gate"]),
        select=select_from_json(data["select"]) if "select" in data else None,
        dropout=float(data["dropout"]),
        returns=tuple(map(str, data["returns"])),
        captures=tuple(
            Capture(str(n), str(kind), tuple(None if x is None else int(x) for x in shape))
            for n, kind, shape in data["captures"]
        ),
        scalars=tuple(map(str, data["scalars"])),
        merge=tuple(map(_from_json, data["merge"])),
        rows=ex.from_tree(data["rows"]) if "rows" in data else sp.true,
    )


def _verify_heads(heads: Heads) -> None:
    if min(heads.q, heads.k, heads.v, heads.d_qk, heads.d_v) < 1:
        raise SpecError(f"head counts and widths must be positive: {heads}.")
    for name, table, count in (("k_map", heads.k_map, heads.k), ("v_map", heads.v_map, heads.v)):
        if len(table) != heads.q or not all(0 <= t < count for t in table):
            raise SpecError(f"{name} must give each of the {heads.q} query heads one of {count} heads: {table}.")


def _verify(spec: AttentionSpec) -> None:
    _verify_heads(spec.heads)
    for name, condition in (("keep", spec.keep), ("rows", spec.rows)):
        if not ex.is_boolean(condition):
            raise SpecError(f"{name} must be a boolean expression: {show(condition)}.")
    mixed = spec.normalizer if isinstance(spec.normalizer, Mixed) else None
    if mixed is not None and not (ex.is_boolean(mixed.near) and 0 < mixed.features < spec.heads.d_qk):
        raise SpecError(
            f"a mixed normaliser needs a condition, and features within {spec.heads.d_qk} columns: {mixed}."
        )
    if not 0.0 <= spec.dropout < 1.0:
        raise SpecError(f"dropout must be in [0, 1): {spec.dropout}.")
    check(spec.returns, isinstance(spec.normalizer, Softmax), bool(spec.merge))
    names = [c.name for c in spec.captures]
    if len(set(names)) != len(names) or not all(n.isidentifier() for n in (*names, *spec.scalars)):
        raise SpecError(f"names of captures and scalars must be distinct identifiers: {names}, {spec.scalars}.")
    allowed = {*ex.COORDINATES, *ex.SIZES, *map(ex.scalar, spec.scalars)}
    row = allowed - {ex.k}
    may = {"score": allowed | {ex.s}, "keep": allowed, "weight": allowed | {ex.s}, "gate": row, "rows": row,
           "divide": row | {ex.t, ex.a}, "sink": row, "near": allowed, "own": row - {ex.h, ex.n_h}}  # fmt: skip
    for part, expr in spec.expressions.items():
        _check_expression(part, expr, may[part], spec)
    _verify_parts(spec)


def _verify_parts(spec: AttentionSpec) -> None:
    if spec.select is not None:
        spec.select.verify(spec.heads.k if spec.select.shared else spec.heads.q)
    for term in spec.merge:
        if term.merge or (term.heads.q, term.heads.d_v) != (spec.heads.q, spec.heads.d_v):
            raise SpecError("attentions that are added up must agree in query heads and value width.")
        term.verify()


def _check_expression(part: str, expr: sp.Basic, allowed: set[sp.Symbol], spec: AttentionSpec) -> None:
    ranks = {c.name: c for c in spec.captures}
    stack: list[sp.Basic] = [expr]
    while stack:
        node = stack.pop()
        if isinstance(node, ex.Load):
            name, *indices = node.args
            capture = ranks.get(getattr(name, "name", ""))
            if capture is None:
                raise SpecError(f"{part} loads {name}, which is not among the captures {sorted(ranks)}.")
            if len(indices) != len(capture.shape):
                raise SpecError(f"{part} loads {name} with {len(indices)} indices; it has {len(capture.shape)}.")
            if not all(i.is_integer for i in indices):
                raise SpecError(f"{part} loads {name} at an index that is no integer: {show(node)}.")
            stack.extend(indices)
        elif isinstance(node, sp.Symbol):
            if node not in allowed:
                raise SpecError(f"{part} mentions {node}, which it may not: {show(expr)}.")
        elif isinstance(node, sp.Basic) and node.func not in ex.KNOWN and node.args:
            raise SpecError(f"{part} contains {node.func.__name__}, which no backend knows.")
        else:
            stack.extend(node.args)
