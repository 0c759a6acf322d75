"""A selection as one more capture of the mask."""

from __future__ import annotations

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.chosen import lowered
from attnopt.analysis.coarse import coarse
from attnopt.select import Select
from attnopt.spec import AttentionSpec, Capture, Heads

SPEC = AttentionSpec(
    Heads(4, 2, 2, 8, 8), keep=sp.And(ex.k <= ex.q, sp.Ne(ex.load("chosen", ex.b, ex.k, integer=True), 0)),
    select=Select("topk", (sp.Integer(2),), 64, 32), captures=(Capture("chosen", "bool", (None, None)),),
)  # fmt: skip


def test_the_choice_is_the_last_capture_under_a_free_name() -> None:
    made = lowered(SPEC)
    made.verify()
    assert made.select is None
    assert [c.name for c in made.captures] == ["chosen", "chosen0"]
    assert made.captures[-1].shape == (None, 4, None, None)
    found, rest = coarse(made.keep)
    assert [(c.rows, c.keys) for c in found] == [(32, 64)]
    assert rest == SPEC.canonical().keep


def test_without_a_selection_nothing_changes() -> None:
    made = lowered(SPEC)
    assert lowered(made) is made
