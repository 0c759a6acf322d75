"""A spec's expressions: their canonical form, their text form, and what they read. Re-exports `functions`.

Numbers are exact rationals, so `s*0.125` and `s/8` are one expression. Integer comparisons meet in
`e >= 0`, so every spelling of causal is one expression. Text is JSON of named nodes, parsed by a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any

import sympy as sp
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from attnopt.errors import SpecError
from attnopt.functions import (
    COORDINATES,
    NEG_INF,
    SIZES,
    FloorDiv,
    IntLoad,
    Load,
    Maximum,
    Minimum,
    Mod,
    Snap,
    Trunc,
    Where,
    a,
    as_number,
    b,
    conjuncts,
    d,
    depends,
    h,
    is_boolean,
    k,
    load,
    magnitude,
    n_b,
    n_h,
    n_k,
    n_q,
    number,
    q,
    s,
    sides,
    t,
    truth,
)

__all__ = [
    "COORDINATES", "KNOWN", "NEG_INF", "SIZES", "FloorDiv", "IntLoad", "Load", "Maximum", "Minimum", "Mod",
    "Snap", "Trunc", "Where", "a", "as_number", "b", "canon", "conjuncts", "d", "depends", "from_tree", "h",
    "is_boolean", "k", "load", "load_names", "loads", "magnitude", "n_b", "n_h", "n_k", "n_q", "number", "q",
    "s", "scalar", "sides", "t", "to_tree", "truth",
]  # fmt: skip

# --- canonical form --------------------------------------------------------------------------------


def canon(expr: sp.Basic) -> sp.Basic:
    """The one form in which equal masks and scores meet. Idempotent."""
    return _canon(expr)


@lru_cache(maxsize=16384)
def _canon(expr: sp.Basic) -> sp.Basic:
    if not expr.args:
        return expr
    if isinstance(expr, sp.core.relational.Relational):
        return _relation(expr)
    if isinstance(expr, sp.Not):
        return _negate(_canon(expr.args[0]))
    args = [_canon(a) for a in expr.args]
    if isinstance(expr, (sp.And, sp.Or)):
        return _absorb(expr.func(*args))
    if isinstance(expr, Where):
        return _where(*args)
    if isinstance(expr, sp.Mul):
        return _spread(args, sp.Mul)
    if isinstance(expr, sp.Add):
        return _spread(args, sp.Add)
    return expr.func(*args)


def _absorb(expr: Boolean) -> Boolean:
    """`x or (x and y)` is `x`, and `x or (not x and y)` is `x or y`; so it is with `and` and `or` exchanged."""
    inner = {sp.And: sp.Or, sp.Or: sp.And}.get(expr.func)
    if inner is None:
        return expr
    whole = set(expr.args)
    kept = [a for a in expr.args if not (isinstance(a, inner) and set(a.args) & whole)]
    short = [inner(*[x for x in a.args if _negate(x) not in whole]) if isinstance(a, inner) else a for a in kept]
    return expr.func(*short) if short == kept else _absorb(expr.func(*short))


def _where(c: Boolean, x: sp.Expr, y: sp.Expr) -> sp.Expr:
    """A test without negation at its head, so that both spellings of a mask agree."""
    opposite = _negate(c)
    if isinstance(y, Where) and y.args[0] in (c, opposite):
        y = y.args[2 if y.args[0] == c else 1]
    if isinstance(x, Where) and x.args[0] in (c, opposite):
        x = x.args[1 if x.args[0] == c else 2]
    loaded = isinstance(c, (sp.Eq, sp.Ne)) and isinstance(c.args[0], IntLoad)
    negated = isinstance(c, sp.Eq) if loaded else isinstance(c, (sp.Not, sp.Ne, sp.Or))
    if negated:
        return Where(_negate(c), y, x)
    return Where(c, x, y)


def _spread(args: list[sp.Expr], op: Callable[..., sp.Expr]) -> sp.Expr:
    """Constants go into a `Where` of constants: `(1 - Where(c, 1, 0))*m` becomes `Where(c, 0, m)`."""
    constants = [a for a in args if a.is_number]
    tests = [a for a in args if isinstance(a, Where) and a.args[1].is_number and a.args[2].is_number]
    if not constants or len(tests) != 1 or len(constants) + 1 != len(args):
        return op(*args)
    c, x, y = tests[0].args
    x, y = op(x, *constants), op(y, *constants)
    return op(*args) if sp.nan in (x, y) else Where(c, x, y)


def _relation(rel: sp.Basic) -> Boolean:
    lhs, rhs = _canon(rel.args[0]), _canon(rel.args[1])
    e = sp.expand(lhs - rhs) if sp.oo not in (lhs, rhs) and NEG_INF not in (lhs, rhs) else None
    if e is None:
        return rel.func(lhs, rhs)
    if isinstance(rel, (sp.Eq, sp.Ne)):
        return _equality(rel, e)
    if isinstance(rel, (sp.Lt, sp.Le)):
        e = -e
    strict = isinstance(rel, (sp.Lt, sp.Gt))
    decided = _canon(e) if e.has(Where) else e
    if isinstance(decided, Where) and decided.args[1].is_number and decided.args[2].is_number:
        c, *branches = decided.args
        return _canon(truth(Where(c, *(sp.Integer(bool(x > 0 if strict else x >= 0)) for x in branches))))
    # Over coordinates `a < b` is `a + 1 <= b`; loaded integers may be as large as their type, where + 1 overflows.
    if e.is_integer and not (strict and e.has(IntLoad)):
        return _nonnegative(e - 1 if strict else e)
    return sp.Gt(e, 0) if strict else sp.Ge(e, 0)


def _equality(rel: sp.Basic, e: sp.Expr) -> Boolean:
    if isinstance(e, Where) and e.args[1].is_number and e.args[2].is_number:
        unequal = _canon(truth(e))
        return unequal if isinstance(rel, sp.Ne) else _negate(unequal)
    if isinstance(e, sp.Add) and len(e.args) == 2 and e.args[0].is_number and isinstance(e.args[1], Where):
        moved = _spread(list(e.args), sp.Add)
        if isinstance(moved, Where):
            return _equality(rel, moved)
    e = _primitive(e)
    if isinstance(e, Where) and 0 in e.args[1:]:
        unequal = _canon(truth(e))
        return unequal if isinstance(rel, sp.Ne) else _negate(unequal)
    if e.is_number:
        return sp.true if (e == 0) == isinstance(rel, sp.Eq) else sp.false
    if rel.func(e, 0) in (sp.true, sp.false):  # `1 - 2*k == 0` never holds over the integers
        return rel.func(e, 0)
    return rel.func(min((_canon(e), _canon(sp.expand(-e))), key=_text), 0, evaluate=False)


def _nonnegative(e: sp.Expr) -> Boolean:
    """`e >= 0` over the integers, divided by the common factor of the coefficients."""
    terms = sp.Add.make_args(e)
    coefficients = [t.as_coeff_Mul()[0] for t in terms if not t.is_number]
    if coefficients and all(c.is_Integer for c in coefficients):
        common = reduce(sp.gcd, coefficients)
        if common > 1:
            constant = sum((t for t in terms if t.is_number), sp.S.Zero)
            e = sum((t / common for t in terms if not t.is_number), sp.S.Zero) + sp.floor(constant / common)
    return sp.Ge(e, 0)


def _primitive(e: sp.Expr) -> sp.Expr:
    return e.as_content_primitive()[1] if e.is_Add else e.as_coeff_Mul()[1] if not e.is_number else e


def _negate(c: Boolean) -> Boolean:
    if isinstance(c, sp.And):
        return sp.Or(*[_negate(a) for a in c.args])
    if isinstance(c, sp.Or):
        return sp.And(*[_negate(a) for a in c.args])
    if isinstance(c, sp.core.relational.Relational):
        return _relation(c.negated)
    return sp.Not(c)


# --- text form -------------------------------------------------------------------------------------

_NODES: dict[str, Any] = {
    "add": sp.Add, "mul": sp.Mul, "pow": sp.Pow, "load": Load, "intload": IntLoad, "floordiv": FloorDiv,
    "mod": Mod, "max": Maximum, "min": Minimum, "where": Where, "trunc": Trunc, "snap": Snap, "abs": sp.Abs,
    "exp": sp.exp, "log": sp.log, "tanh": sp.tanh, "sin": sp.sin, "cos": sp.cos, "sign": sp.sign, "erf": sp.erf,
    "floor": sp.floor, "and": sp.And, "or": sp.Or, "not": sp.Not, "ge": sp.Ge, "gt": sp.Gt, "eq": sp.Eq,
    "ne": sp.Ne, "le": sp.Le, "lt": sp.Lt,
}  # fmt: skip
_NAMES = {cls: name for name, cls in _NODES.items()}
KNOWN = frozenset({*_NODES.values(), sp.exp})
_UNORDERED = {"add", "mul", "and", "or"}
_SYMBOLS = {x.name: x for x in (s, *COORDINATES, d, *SIZES, t, a)}


def scalar(name: str) -> sp.Symbol:
    """An integer that the graph supplies at run time, such as a cache offset."""
    return sp.Symbol(name, integer=True)


def to_tree(expr: sp.Basic) -> list[Any]:
    """Nested lists of strings; equal expressions give equal trees in every process."""
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return ["bool", str(bool(expr))]
    if expr in (sp.oo, NEG_INF):
        return ["inf", "+" if expr == sp.oo else "-"]
    if isinstance(expr, sp.Rational):
        return ["num", str(expr.p), str(expr.q)]
    if isinstance(expr, sp.Symbol):
        return ["sym", expr.name]
    if expr is sp.E:
        return ["e"]
    name = "exp" if isinstance(expr, sp.exp) else _NAMES.get(expr.func)
    if name is None:
        raise SpecError(f"an expression may not contain {expr.func.__name__}: {expr}.")
    args = [to_tree(a) for a in expr.args]
    return [name, *(sorted(args, key=json.dumps) if name in _UNORDERED else args)]


def from_tree(tree: Any, depth: int = 0) -> sp.Basic:
    """The inverse of `to_tree`. Anything that is not on the list of nodes raises `SpecError`."""
    if depth > 200 or not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
        raise SpecError("expression text is malformed: every node must be a list that starts with its name.")
    name, *rest = tree
    try:
        if name in ("bool", "inf", "num", "sym", "e"):
            return _leaf(name, rest)
        if name in ("load", "intload"):
            return load(rest[0][1], *[from_tree(a, depth + 1) for a in rest[1:]], integer=name == "intload")
        args = [from_tree(a, depth + 1) for a in rest]
        logical = [name in ("and", "or", "not") or (name, i) == ("where", 0) for i in range(len(args))]
        mixed = any(is_boolean(a) != wanted for a, wanted in zip(args, logical, strict=True))
        if mixed or (name == "pow" and not (args[1].is_Rational and abs(args[1]) <= 16)):
            raise SpecError(f"expression text has a {name!r} node of the wrong kind of arguments.")
        return _NODES[name](*args)
    except SpecError:
        raise
    except KeyError:
        raise SpecError(f"expression text names an unknown node {name!r}.") from None
    except Exception as error:
        raise SpecError(f"expression text has a malformed {name!r} node: {error}.") from None


def _leaf(name: str, rest: list[str]) -> sp.Basic:
    if not all(isinstance(r, str) and len(r) < 2000 for r in rest):
        raise SpecError(f"expression text has a malformed {name!r} leaf.")
    if name == "bool":
        return {"True": sp.true, "False": sp.false}[rest[0]]
    if name == "inf":
        return {"+": sp.oo, "-": NEG_INF}[rest[0]]
    if name == "num" and int(rest[1]) > 0:
        return sp.Rational(int(rest[0]), int(rest[1]))
    if name == "e":
        return sp.E
    if not rest[0].isidentifier():
        raise SpecError(f"expression text names a symbol {rest[0]!r} that is no identifier.")
    return _SYMBOLS.get(rest[0]) or scalar(rest[0])


def _text(expr: sp.Basic) -> str:
    return json.dumps(to_tree(expr), separators=(",", ":"))


def loads(*exprs: sp.Basic) -> list[Load]:
    """Every load in the expressions, outermost first, each once, in a stable order."""
    found: dict[Load, None] = {}
    for expr in exprs:
        for node in sp.preorder_traversal(expr):
            if isinstance(node, Load):
                found.setdefault(node)
    return sorted(found, key=_text)


def load_names(*exprs: sp.Basic) -> list[str]:
    """The names of the captured tensors that the expressions read."""
    return sorted({load.args[0].name for load in loads(*exprs)})
