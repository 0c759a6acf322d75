"""Every kind has a maker and plans, and says why a spec has no kernel of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp

from attnopt.aot.standard import layout_for, standard
from attnopt.codegen import triton
from attnopt.codegen.triton_kinds import EMIT, MISSING, PLANS
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import SpecError
from attnopt.select import Select
from attnopt.spec import Heads

SPECS = dict(standard(Heads(4, 2, 2, 32, 32)))
SPECS["chosen"] = replace(SPECS["causal"], select=Select("topk", (sp.Integer(3),)))


def test_the_tables_agree() -> None:
    assert set(EMIT) == set(PLANS) >= set(MISSING)


@pytest.mark.parametrize("kind", sorted(EMIT))
def test_a_kind_makes_what_it_is_called_or_says_why_not(kind: str) -> None:
    made = 0
    for name, spec in SPECS.items():
        layout = layout_for(spec, "bfloat16")
        plan = PLANS[kind](CHIPS["sm_90"], "bfloat16", 32, 32)[0]
        reason = MISSING.get(kind, triton.supported)(spec, layout)
        if reason is None:
            assert EMIT[kind](spec, layout, plan).kind == kind, name
            made += 1
        else:
            with pytest.raises(SpecError, match=r"\w+"):
                EMIT[kind](spec, layout, plan)
    assert made
