"""The choice of blocks as a value: its text, its words, and what makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.formula import formula
from attnopt.select import Select, select_from_json, select_to_json
from attnopt.spec import AttentionSpec, Heads

SELECT = Select("mass", (sp.Rational(9, 10),), 64, 32, own=ex.q + ex.n_k - ex.n_q, first=1, scale=sp.Rational(1, 8))
SPEC = AttentionSpec(Heads(4, 2, 2, 8, 8), score=ex.s / 8, keep=ex.k <= ex.q, select=SELECT)


def test_text_holds_all_of_it() -> None:
    for select in (SELECT, Select("topk", tuple(map(sp.Integer, (1, 2, 3, 4))), 16, 1, shared=False)):
        spec = replace(SPEC, select=select).canonical()
        assert select_from_json(json.loads(json.dumps(select_to_json(select.canonical())))) == select.canonical()
        assert AttentionSpec.parse(spec.text) == spec
        assert AttentionSpec.parse(spec.text).select == select.canonical()


def test_every_part_counts_in_the_key() -> None:
    changes: list[dict[str, Any]] = [
        {"rule": "topk", "amount": (sp.Integer(1),)}, {"block": 32}, {"tile": 64}, {"own": None}, {"first": 0},
        {"scale": sp.S.One}, {"shared": True}, {"amount": (sp.Rational(1, 2),)},
    ]  # fmt: skip
    keys = {replace(SPEC, select=replace(SELECT, **change)).key for change in changes}
    assert len(keys | {SPEC.key, replace(SPEC, select=None).key}) == len(changes) + 2


def test_words() -> None:
    assert str(SELECT) == (
        "select blocks of mass 9/10 of 64 keys by mean for 32 queries, always the first 1 and that of key n_k + q - n_q"
    )
    assert "select blocks of mass 9/10" in str(SPEC)
    assert "k <= q and block k//64 is chosen for tile q//32" in formula(SPEC)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rule": "best"}, "topk or mass"),
        ({"estimator": "last"}, "of means"),
        ({"block": 48}, "block must be a power of two"),
        ({"tile": 0}, "tile must be a power of two"),
        ({"amount": (sp.Rational(1, 2),) * 3}, "one for each of 4 heads"),
        ({"amount": (sp.Rational(1, 2),) * 4, "shared": True}, "one for each of 2 heads"),
        ({"amount": (sp.Rational(3, 2),)}, "no mass"),
        ({"rule": "topk"}, "no number of blocks"),
        ({"amount": (sp.S.Zero,)}, "no mass"),
        ({"first": -1}, "number of blocks"),
        ({"own": ex.q / 2}, "must be integers"),
        ({"own": ex.q + ex.h}, "may not"),
        ({"own": ex.k}, "may not"),
    ],
)
def test_what_makes_no_sense(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        replace(SPEC, select=replace(SELECT, **change)).verify()
