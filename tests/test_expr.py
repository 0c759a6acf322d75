"""Canonical form, text form and readable form of expressions."""

from __future__ import annotations

import itertools
import json

import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.expr import b, h, k, q, s
from attnopt.readable import show

PAD = ex.load("pad", b, k, integer=True)
BIAS = ex.load("bias", h, q, k)

integers = st.integers(-3, 3).map(sp.Integer)
atoms = st.one_of(integers, st.sampled_from([q, k, h, PAD, ex.FloorDiv(q, 3), ex.Mod(k, 2), ex.Minimum(q, k)]))
linear = st.recursive(
    atoms, lambda e: st.tuples(st.sampled_from([sp.Add, sp.Mul]), e, e).map(lambda t: t[0](t[1], t[2])), max_leaves=5
)
relations = st.tuples(st.sampled_from([sp.Ge, sp.Gt, sp.Le, sp.Lt, sp.Eq, sp.Ne]), linear, linear).map(
    lambda t: t[0](t[1], t[2])
)
conditions = st.recursive(
    relations,
    lambda c: st.one_of(
        c.map(sp.Not), st.tuples(st.sampled_from([sp.And, sp.Or]), c, c).map(lambda t: t[0](t[1], t[2]))
    ),
    max_leaves=4,
)
choices = st.tuples(conditions, linear, linear).map(lambda t: ex.Where(t[0], t[1], t[2]))
expressions = st.one_of(linear, conditions, choices, st.tuples(choices, integers).map(lambda t: t[0] * t[1] + 2))
POINTS = [dict(zip((b, h, q, k), p, strict=True)) for p in itertools.product((0,), (0, 2), (0, 1, 4), (0, 1, 2, 5))]


def _at(expr: sp.Basic, point: dict[sp.Symbol, int]) -> sp.Basic:
    """The value at a point, where the padding mask is 1 at even keys and Python's integers do the rest."""
    if expr in point:
        return sp.Integer(point[expr])
    if isinstance(expr, ex.Load):
        return sp.Integer((int(_at(expr.args[2], point)) + 1) % 2)
    if not expr.args:
        return expr
    return expr.func(*[_at(a, point) for a in expr.args])


@settings(max_examples=120, deadline=None)
@given(expressions)
def test_canonical_form_is_idempotent_and_keeps_the_value(expr: sp.Basic) -> None:
    found = ex.canon(expr)
    assert ex.canon(found) == found
    assert all(_at(found, p) == _at(expr, p) for p in POINTS)


@settings(max_examples=120, deadline=None)
@given(expressions)
def test_text_round_trip(expr: sp.Basic) -> None:
    found = ex.canon(expr)
    tree = json.loads(json.dumps(ex.to_tree(found)))
    assert ex.canon(ex.from_tree(tree)) == found
    assert show(found)


def test_an_equation_without_solutions_is_false() -> None:
    assert ex.canon(sp.Eq(-2 * k - 1, 2 * k - 3, evaluate=False)) == sp.false
    assert ex.canon(sp.Ne(2 * q, 1, evaluate=False)) == sp.true


CAUSAL = (
    k <= q, q >= k, k < q + 1, sp.Not(k > q), q - k >= 0, 2 * k <= 2 * q, sp.Not(sp.Ge(k - q, 1)), ~(q < k), k - q < 1,
    3 * k < 3 * q + 1, sp.Eq(ex.Where(k > q, sp.S.One, sp.S.Zero), 0), ex.truth(ex.Where(k > q, sp.S.Zero, sp.S.One)),
    sp.And(k <= q, k < q + 1), sp.Ne(1 - ex.Where(k > q, sp.S.One, sp.S.Zero), 0),
)  # fmt: skip


@pytest.mark.parametrize("spelling", CAUSAL, ids=range(len(CAUSAL)))
def test_spellings_of_causal_meet(spelling: sp.Basic) -> None:
    assert ex.canon(spelling) == ex.canon(k <= q)
    assert show(ex.canon(spelling)) == "k <= q"


MEETS = (
    (s * ex.number(0.125), s / 8),
    (sp.Ne(PAD, 0), ex.truth(PAD)),
    (sp.Not(sp.Eq(PAD, 0)), sp.Ne(PAD, 0)),
    (ex.Where(sp.Eq(PAD, 0), sp.S.NegativeOne, sp.S.Zero), ex.Where(sp.Ne(PAD, 0), sp.S.Zero, sp.S.NegativeOne)),
    (sp.Eq(q, k), sp.Eq(k - q, 0)),
    (ex.Where(q > k, s, ex.Where(q > k, sp.S.One, BIAS)), ex.Where(q > k, s, BIAS)),
)


@pytest.mark.parametrize(("one", "other"), MEETS, ids=range(len(MEETS)))
def test_other_spellings_meet(one: sp.Basic, other: sp.Basic) -> None:
    assert ex.canon(one) == ex.canon(other)


def _deep(n: int) -> object:
    tree: object = ["sym", "s"]
    for _ in range(n):
        tree = ["abs", tree]
    return tree


HOSTILE = (
    None, 3, "s", [], [[]], {}, ["sym"], ["sym", "__import__('os')"], ["sym", 3], ["num", "1"], ["num", "1", "0"],
    ["num", "x", "1"], ["num", "9" * 5000, "1"], ["bool", "yes"], ["inf", "?"], ["nope", ["sym", "s"]], ["load"],
    ["load", ["sym", "a b"], ["sym", "q"]], ["load", 3], ["add", 3], ["where", ["sym", "s"]], ["lt", ["bool", "True"], ["sym", "q"]],
    ["and", ["sym", "q"]], ["not", ["num", "1", "1"]], ["floordiv", ["sym", "q"]], ["pow", ["sym", "s"], ["num", "1", "0"]],
    ["eval", ["sym", "s"]], ["__class__", ["sym", "s"]], _deep(300), _deep(900), ["where", ["num", "1", "1"], ["sym", "s"], ["sym", "s"]],
    ["pow", ["num", "9", "1"], ["pow", ["num", "9", "1"], ["num", "9", "1"]]], ["exp", ["bool", "True"]], ["mul", ["bool", "True"], ["sym", "s"]],
    ["pow", ["num", "9" * 1000, "1"], ["num", "99999", "1"]], ["add", ["and", ["bool", "True"]], ["sym", "s"]],
)  # fmt: skip


@pytest.mark.parametrize("tree", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_trees_raise_spec_errors_only(tree: object) -> None:
    with pytest.raises(SpecError):
        ex.from_tree(tree)


def test_numbers_are_exact_rationals() -> None:
    assert ex.number(0.1) == sp.Rational(0.1)
    assert ex.number(float("-inf")) == ex.NEG_INF
    assert ex.number(float("nan")) is sp.nan
    assert ex.number(True) == 1


def test_functions_fold_constants() -> None:
    assert ex.FloorDiv(sp.Integer(-7), sp.Integer(2)) == -4
    assert ex.Mod(sp.Integer(-7), sp.Integer(4)) == 1
    assert ex.Maximum(sp.Integer(2), sp.Rational(1, 2)) == 2
    assert ex.Minimum(q, q) == q
    assert ex.Where(sp.true, q, k) == q
    assert ex.Trunc(q) == q
    assert sp.diff(ex.Where(k <= q, s**2, 3 * s), s) == ex.Where(k <= q, 2 * s, sp.Integer(3))


def test_loads_are_listed_in_a_stable_order_and_names_are_checked() -> None:
    assert ex.load_names(BIAS + s, sp.Ne(PAD, 0)) == ["bias", "pad"]
    assert ex.depends(BIAS, h)
    assert not ex.depends(PAD, h)
    with pytest.raises(SpecError, match="identifier"):
        ex.load("a b", q)


def test_what_no_backend_knows_has_no_text() -> None:
    with pytest.raises(SpecError, match="may not contain"):
        ex.to_tree(sp.gamma(s))
