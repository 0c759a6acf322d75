"""Which masks have their lists written by a kernel; `test_triton_select` compares what it writes with torch's lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch

pytest.importorskip("triton")

from attnopt import expr as ex
from attnopt.analysis.chosen import lowered
from attnopt.runtime.lists import Lists
from attnopt.runtime.triton_lists import Visits, chosen_capture
from attnopt.spec import AttentionSpec
from tests.runtime import test_chosen as known


def _place(spec: AttentionSpec) -> int | None:
    spec = spec.canonical()
    return chosen_capture(spec, Lists(spec, (16, 16)))


def test_a_choice_is_found_whatever_its_tile_is() -> None:
    for name in ("topk", "single queries", "wide tiles"):
        assert _place(lowered(known._spec(known.SELECTS[name]))) == 0
    assert _place(lowered(known._spec(known.SELECTS["topk"], pad=True))) == 1, "whatever the rest of the mask is"


def test_other_masks_are_torchs() -> None:
    spec = lowered(known._spec(known.SELECTS["topk"]))
    assert _place(replace(spec, keep=ex.k <= ex.q)) is None
    moved = ex.load("chosen", ex.b, ex.h, ex.FloorDiv(ex.q, 16), ex.FloorDiv(ex.k, 16) + 1, integer=True)
    assert _place(replace(spec, keep=sp.Ne(moved, 0))) is None


def test_what_is_no_bool_or_does_not_launch_is_torchs() -> None:
    spec = lowered(known._spec(known.SELECTS["topk"]))
    q, k, _ = known._inputs(40, 40)
    visits = Visits(spec, Lists(spec, (16, 16), ragged=True))
    chosen = torch.ones(2, 6, 3, 3, dtype=torch.bool)
    assert visits(q, k, [chosen.float()], ()) is None
    assert visits.place == 0
    assert visits(q, k, [chosen], ()) is None, "there is no interpreter here, and no GPU"
    assert visits.place is None
