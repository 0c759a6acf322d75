"""Expressions as people read them: `s/8 + bias[h, q, k]`, `k <= q and pad[b, k]`."""

from __future__ import annotations

from functools import reduce

import sympy as sp

from attnopt.expr import NEG_INF, FloorDiv, IntLoad, Load, Mod, is_boolean, s

_INFIX = {sp.Ge: ">=", sp.Gt: ">", sp.Eq: "==", sp.Ne: "!=", sp.Le: "<=", sp.Lt: "<"}


def show(expr: sp.Basic) -> str:
    """One readable line: `s/8 + bias[h, q, k]`, `k <= q and pad[b, k]`."""
    if isinstance(expr, sp.Rational):
        return str(expr) if expr.q <= 1024 and abs(expr.p) < 1_000_000 else f"{float(expr):.6g}"
    if expr in (sp.oo, NEG_INF):
        return "inf" if expr == sp.oo else "-inf"
    if isinstance(expr, Load):
        return f"{expr.args[0].name}[{', '.join(show(a) for a in expr.args[1:])}]"
    if isinstance(expr, sp.core.relational.Relational):
        return _show_relation(expr)
    if isinstance(expr, (sp.And, sp.Or)):
        word = " and " if isinstance(expr, sp.And) else " or "
        parts = sorted((show(a) for a in expr.args), key=lambda text: ("[" in text, text))
        return word.join(f"({p})" if " or " in p or " and " in p else p for p in parts)
    if isinstance(expr, sp.Not):
        return f"not ({show(expr.args[0])})"
    if isinstance(expr, sp.Add):
        terms = sorted(
            expr.args, key=lambda t: (not t.has(s), bool(t.is_number), t.could_extract_minus_sign(), show(t))
        )
        return reduce(lambda a, t: f"{a} - {t[1:]}" if t.startswith("-") else f"{a} + {t}", map(show, terms))
    if isinstance(expr, sp.Mul):
        return _show_product(expr)
    if isinstance(expr, sp.Pow):
        power = _atom(expr.args[1])
        return f"{_atom(expr.args[0])}**{f'({power})' if '/' in power and power[0] != '(' else power}"
    if isinstance(expr, (FloorDiv, Mod)):
        return f"{_atom(expr.args[0])}{'//' if isinstance(expr, FloorDiv) else ' % '}{_atom(expr.args[1])}"
    if expr.args:
        return f"{expr.func.__name__.lower()}({', '.join(show(a) for a in expr.args)})"
    return str(expr)


def _show_relation(rel: sp.Basic) -> str:
    lhs, rhs = rel.args
    if isinstance(rel, sp.Ne) and rhs == 0 and isinstance(lhs, IntLoad):
        return show(lhs)
    if isinstance(rel, sp.Eq) and rhs == 0 and isinstance(lhs, IntLoad):
        return f"not {show(lhs)}"
    if rhs == 0 and not isinstance(lhs, sp.Add) and lhs.could_extract_minus_sign():
        lhs, rel = -lhs, {sp.Ge: sp.Le, sp.Gt: sp.Lt}.get(rel.func, rel.func)(lhs, rhs, evaluate=False)
    if rhs == 0 and isinstance(lhs, sp.Add):
        minus = [t for t in lhs.args if t.could_extract_minus_sign()]
        if not minus:
            return f"{show(lhs)} {_INFIX[rel.func]} 0"
        left, right = sp.Add(*[-t for t in minus]), sp.Add(*[t for t in lhs.args if t not in minus])
        sign = {sp.Gt: "<", sp.Ge: "<="}.get(rel.func, _INFIX[rel.func])
        return f"{show(left)} {sign} {show(right)}"
    return f"{show(lhs)} {_INFIX[rel.func]} {show(rhs)}"


def _show_product(expr: sp.Mul) -> str:
    coefficient, rest = expr.as_coeff_Mul()
    factors = sp.Mul.make_args(rest)
    alone = len(factors) == 1 and coefficient in (1, -1)
    # `2*(k % 3)` is not `2*k % 3`: both operators bind alike.
    body = "*".join(f"({show(a)})" if isinstance(a, (FloorDiv, Mod)) and not alone else _atom(a) for a in factors)
    if coefficient == -1:
        return f"-{body}"
    if coefficient.p == 1 and 1 < coefficient.q <= 1024:
        return f"{body}/{coefficient.q}"
    return f"{show(coefficient)}*{body}" if coefficient != 1 else body


def _atom(expr: sp.Basic) -> str:
    text = show(expr)
    if isinstance(expr, sp.Symbol):
        return text
    return f"({text})" if isinstance(expr, (sp.Add, sp.Mul)) or is_boolean(expr) or text.startswith("-") else text
