"""Expressions as source text: a typed printer with a table for each language.

Every printed value has a kind (bool, int, long, float) and a rank (scalar, or vector over keys). Casts and
broadcasts are explicit. What does not depend on the key is printed once per row.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import sympy as sp
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.readable import show

# In the order of promotion. `i` fits 32 bits; `l` is data of 64 bits.
KINDS = "bilf"


@dataclass(frozen=True)
class Value:
    """Source text of one value. `kind` is one of `b i l f`; `vector` tells whether it has one lane per key."""

    code: str
    kind: str
    vector: bool = False


@dataclass(frozen=True)
class Row:
    """How one node is printed: `template` with `{0}, {1}`; `takes` the kind of the arguments, `gives` of the result.

    `takes` and `gives` may be `*`: the widest kind among the arguments. With `fold` the node takes any number.
    """

    template: str
    takes: str = "*"
    gives: str = "*"
    fold: bool = False


def c_float(value: float) -> str:
    """A finite number as a literal of C."""
    text = f"{value:.9g}"
    return f"{text if any(c in text for c in '.en') else f'{text}.0'}f"


C_FORMS: Mapping[sp.Expr | str, str] = {
    sp.Integer(2): "square_({0})",
    sp.S.NegativeOne: "(1.0f / {0})",
    sp.S.Half: "sqrt_({0})",
    -sp.S.Half: "(1.0f / sqrt_({0}))",
}


@dataclass(frozen=True)
class Dialect:
    """One language: rows by node, casts by (from, to, vector), broadcasts by kind, and literals.

    `forms` are cheaper templates for powers: 2, -1, 1/2, -1/2, and under `n` any other integer, written `@`.
    """

    rows: Mapping[type, Row]
    casts: Mapping[tuple[str, str, bool], str]
    splats: Mapping[str, str]
    types: Mapping[tuple[str, bool], str]
    infinity: str
    true: str
    false: str
    statement: str
    select: str
    number: Callable[[float], str] = c_float
    forms: Mapping[sp.Expr | str, str] = field(default_factory=lambda: C_FORMS)


# Named once, so that a second use costs nothing.
_NAMED = (ex.Where, sp.exp, sp.log, sp.tanh, sp.sin, sp.cos, sp.erf, sp.Pow, ex.FloorDiv, ex.Mod)

Loader = Callable[["Printer", ex.Load], Value]


@dataclass
class Printer:
    """Prints expressions into statements (`row` once per row, `body` once per vector of keys) and values.

    `symbols` says how each symbol is written; `loader` prints loads. `guards` are the conditions under which
    the current part is wanted: a load under a guard may leave its tensor where the guard is false.
    """

    dialect: Dialect
    symbols: Mapping[sp.Symbol, Value]
    loader: Loader
    row: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    guards: tuple[Value, ...] = ()
    memo: dict[tuple[sp.Basic, tuple[Value, ...]], Value] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def scope(self) -> Printer:
        """A printer for a nested block: it sees what is named here and keeps its own statements."""
        return replace(self, body=[], memo=dict(self.memo))

    def visit(self, expr: sp.Basic) -> Value:
        """The value of `expr`. Raises `SpecError` for a node that the dialect has no row for."""
        if self.guards and not expr.has(ex.Load):  # nothing can go wrong there, so it may move to the row
            return replace_guards(self, ()).visit(expr)
        key = (expr, self.guards)
        if key not in self.memo:
            self.memo[key] = self._visit(expr)
        return self.memo[key]

    def name(self, value: Value, stem: str) -> Value:
        """The value under a new name: a statement of the row if it is scalar and unguarded, else of the body."""
        label = self.fresh(stem)
        kind = self.dialect.types[value.kind, value.vector]
        line = self.dialect.statement.format(type=kind, name=label, code=_bare(value.code))
        (self.body if value.vector or self.in_body else self.row).append(line)
        return Value(label, value.kind, value.vector)

    def fresh(self, stem: str) -> str:
        """A name that was not used yet."""
        number = self.counts[stem] = self.counts.get(stem, -1) + 1
        return f"{stem}{number}"

    @property
    def in_body(self) -> bool:
        """Whether a guard depends on the key, so that nothing under it can move to the row."""
        return any(g.vector for g in self.guards)

    def cast(self, value: Value, kind: str, vector: bool) -> Value:
        """The value as another kind and rank; both only widen."""
        if value.kind != kind:
            template = self.dialect.casts[value.kind, kind, value.vector]
            value = Value(template.format(value.code), kind, value.vector)
        if vector and not value.vector:
            value = Value(self.dialect.splats[kind].format(value.code), kind, True)
        return value

    def _visit(self, expr: sp.Basic) -> Value:
        leaf = self._leaf(expr)
        if leaf is not None:
            return leaf
        if isinstance(expr, ex.Load):
            return self.loader(self, expr)
        value = self._where(expr) if isinstance(expr, ex.Where) else self._node(expr)
        if not value.vector:
            return self.name(value, "row") if not self.in_body else value
        return self.name(value, "t") if isinstance(expr, _NAMED) else value

    def _leaf(self, expr: sp.Basic) -> Value | None:
        if isinstance(expr, sp.Symbol):
            return self.symbols[expr]
        if isinstance(expr, (BooleanTrue, BooleanFalse)):
            return Value(self.dialect.true if expr == sp.true else self.dialect.false, "b")
        if isinstance(expr, sp.Integer) and abs(expr) < 2**63:
            return integer(int(expr))
        if expr.is_number and not expr.has(ex.Where):
            return Value(self.literal(expr), "f")
        return None

    def literal(self, number: sp.Expr) -> str:
        """A number as a 32-bit float literal that reads back to the same bits."""
        try:
            value = struct.unpack("f", struct.pack("f", float(number)))[0]
        except OverflowError:
            value = float("inf") if number > 0 else float("-inf")
        if value != value:
            raise SpecError("a constant of an expression is not a number.")
        if value in (float("inf"), float("-inf")):
            return f"{'-' if value < 0 else ''}{self.dialect.infinity}"
        text = self.dialect.number(value)
        return f"({text})" if text.startswith("-") else text

    def _node(self, expr: sp.Basic) -> Value:
        function = sp.exp if isinstance(expr, sp.exp) else expr.func
        row = self.dialect.rows.get(function)
        if row is None:
            raise SpecError(f"no row prints {function.__name__} in {show(expr)}.")
        special = _special(expr, self.dialect.forms)
        if special is not None:
            return self._template(*special)
        args = self._ordered(expr) if row.fold else list(ex.sides(expr))
        return self._template(row, [self.visit(a) for a in args])

    def _ordered(self, expr: sp.Basic) -> list[sp.Basic]:
        """Arguments in a stable order that loses no digits; then scalars first: they meet before any broadcast."""
        weight = ex.magnitude if isinstance(expr, sp.Add) else lambda a: ()
        return sorted(expr.args, key=lambda a: (weight(a), ex.depends(a, ex.k, ex.s), not a.is_number, show(a)))

    def _template(self, row: Row, args: list[Value | sp.Basic]) -> Value:
        values = [self.visit(a) if isinstance(a, sp.Basic) else a for a in args]
        if row.fold:
            return reduce(lambda x, y: self._apply(row, [x, y]), values)
        return self._apply(row, values)

    def _apply(self, row: Row, values: list[Value]) -> Value:
        vector = any(v.vector for v in values)
        widest = max((v.kind for v in values), key=KINDS.index)
        kind = row.takes if row.takes != "*" else "i" if widest == "b" else widest
        code = row.template.format(*(self.cast(v, kind, vector).code for v in values))
        return Value(code, kind if row.gives == "*" else row.gives, vector)

    def _where(self, expr: ex.Where) -> Value:
        c, x, y = expr.args
        test = self.visit(c)
        if not test.code.isidentifier():
            test = self.name(test, "test")
        yes = replace_guards(self, (*self.guards, test)).visit(x)
        inverse = Value(self.dialect.rows[sp.Not].template.format(test.code), "b", test.vector)
        no = replace_guards(self, (*self.guards, inverse)).visit(y)
        vector = test.vector or yes.vector or no.vector
        kind = max(yes.kind, no.kind, key=KINDS.index)
        parts = [self.cast(test, "b", vector), self.cast(yes, kind, vector), self.cast(no, kind, vector)]
        return Value(self.dialect.select.format(*(p.code for p in parts)), kind, vector)


def replace_guards(printer: Printer, guards: tuple[Value, ...]) -> Printer:
    """The same printer, statements and names included, under other guards."""
    return replace(printer, guards=guards)


def integer(value: int) -> Value:
    """An integer literal."""
    code = f"({value})" if value < 0 else str(value)
    return Value(code, "i" if -(2**31) <= value < 2**31 else "l")


def _special(expr: sp.Basic, forms: Mapping[sp.Expr | str, str]) -> tuple[Row, list[Value | sp.Basic]] | None:
    """Cheaper forms: small powers, roots, and division by powers of two."""
    if isinstance(expr, sp.Pow):
        base, exponent = expr.args
        template = forms.get(exponent)
        if template is None and exponent.is_Integer and "n" in forms:
            template = forms["n"].replace("@", str(exponent))
        if template is not None:
            return (Row(template) if exponent == 2 else Row(template, "f", "f")), [base]
    whole = isinstance(expr, (ex.FloorDiv, ex.Mod)) and expr.args[0].is_integer and expr.args[1].is_Integer
    if whole:
        x, y = expr.args[0], int(expr.args[1])
        if y > 0 and y & (y - 1) == 0:
            template = f"({{0}} >> {y.bit_length() - 1})" if isinstance(expr, ex.FloorDiv) else f"({{0}} & {y - 1})"
            return Row(template), [x]
    return None


def _bare(code: str) -> str:
    """The text without one pair of parentheses around all of it."""
    if not (code.startswith("(") and code.endswith(")")):
        return code
    depth = 0
    for position, character in enumerate(code):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and position < len(code) - 1:
            return code
    return code[1:-1]
