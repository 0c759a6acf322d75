"""Conditions on remainders and their names."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.digits import remainders
from attnopt.analysis.grid import Grid
from attnopt.analysis.parts import Columns, Part, Phase
from attnopt.expr import FloorDiv, Mod, k, q
from tests.analysis.keeps import START

_I = sp.Integer
ROWS = (
    (sp.Eq(Mod(q - k, 3), 0), Phase(_I(3), relative=True)),
    (sp.Eq(Mod(k - q, 3), 2), Phase(_I(3), _I(1), relative=True)),
    (sp.Eq(Mod(k + q, 2), 0), Phase(_I(2), relative=True)),
    (sp.Eq(Mod(k + START, 4), 1), Phase(_I(4), START + 3)),
    (sp.Ne(Mod(k, 4), 0), Phase(_I(4), _I(3), _I(3))),
    (sp.Ge(Mod(k, 8) - 6, 0), Phase(_I(8), _I(2), _I(2))),
    (sp.Ge(1 - Mod(-k, 8), 0), Phase(_I(8), _I(1), _I(2))),
    (sp.Eq(Mod(k, 4) - Mod(q, 4), 0), Phase(_I(4), relative=True)),
    (sp.Ge(2 - Mod(k, 8) + Mod(q, 8), 0), Columns(_I(8), right=_I(2))),
    (sp.Ge(2 + Mod(k, 8) - Mod(q, 8), 0), Columns(_I(8), left=_I(2))),
    (sp.Eq(Mod(k, 8) - Mod(q, 8) + 1, 0), Columns(_I(8), left=_I(1), right=_I(-1))),
    (sp.Ge(1 - Mod(FloorDiv(k, 2), 4) + Mod(FloorDiv(q, 2), 4), 0), Columns(_I(4), _I(2), right=_I(1))),
)


@pytest.mark.parametrize(("condition", "want"), ROWS, ids=[str(r[0]) for r in ROWS])
def test_named(condition: sp.Basic, want: Part) -> None:
    assert remainders(ex.canon(condition)) == want
    grid = Grid((1, 1, 17, 19), scalars={"start": 5})
    assert (want.dense(grid) == grid.dense(condition)).all()


NAMELESS = (
    sp.Eq(Mod(k * q, 3), 0),
    sp.Eq(Mod(3 * k, 7), 0),
    sp.Ge(Mod(k, 8) - Mod(q, 4), 0),
    sp.Ge(Mod(k, 8) + Mod(q, 8) - 3, 0),
    sp.Eq(Mod(k + q, 3), 0),
    sp.Ge(Mod(k, 4) - q, 0),
    sp.Or(k < 3, q < 3, evaluate=False),
    sp.Ne(Mod(k, 3) * Mod(q, 3), 0),
)


@pytest.mark.parametrize("condition", NAMELESS, ids=str)
def test_nameless(condition: sp.Basic) -> None:
    assert remainders(ex.canon(condition)) is None
