"""Joining solutions: what is implied is left out, what is shared stands once, contradictions are no key."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt.analysis.solution import ALL, NOTHING, Below, Both, Either, From, Leaf, Node, both, either, nonnegative
from attnopt.expr import Mod, b, h, k, n_b, n_k, n_q, q

_LEAF = Leaf(sp.Eq(Mod(k - q, 2), 0))
JOINS = (
    (both([]), ALL),
    (either([]), NOTHING),
    (both([From(q), From(q - 3)]), From(q)),
    (either([From(q), From(q - 3)]), From(q - 3)),
    (both([Below(q), Below(n_k - 1)]), Both((Below(q), Below(n_k - 1)))),
    (both([Below(q + 1), From(q + 1)]), NOTHING),
    (either([Below(q + 2), From(q + 1)]), ALL),
    (either([Below(q), From(q + 1)]), Either((From(q + 1), Below(q)))),
    (both([ALL, _LEAF]), _LEAF),
    (both([NOTHING, _LEAF]), NOTHING),
    (either([ALL, _LEAF]), ALL),
    (either([NOTHING, _LEAF]), _LEAF),
    (both([both([From(q), _LEAF]), From(q + 1)]), Both((From(q + 1), _LEAF))),
    (either([both([Below(q), _LEAF]), both([From(q + 9), _LEAF])]), Both((_LEAF, Either((From(q + 9), Below(q)))))),
    (either([_LEAF, both([_LEAF, From(q)])]), _LEAF),
)


@pytest.mark.parametrize(("found", "want"), JOINS, ids=[str(i) for i in range(len(JOINS))])
def test_joins(found: Node, want: Node) -> None:
    assert found == want


SIGNS = (
    (sp.Integer(0), True),
    (sp.Integer(-1), False),
    (n_q - 1 - q, True),
    (n_q - q - 2, False),
    (q + b + h, True),
    (n_b - b - 1, True),
    (n_k - n_q, False),
    (Mod(q, 4), True),
    (3 - Mod(q - k, 4), True),
    (2 - Mod(q - k, 4), False),
)


@pytest.mark.parametrize(("e", "sure"), SIGNS, ids=[str(s[0]) for s in SIGNS])
def test_a_sign_is_sure_inside_the_extents(e: sp.Expr, sure: bool) -> None:
    assert nonnegative(e) is sure
