"""Bands: found from the kept pairs alone, and only where these are all of a band."""

from __future__ import annotations

import numpy as np
import pytest

from attnopt import expr as ex
from attnopt.patterns.bands import band
from attnopt.patterns.grids import Unproven

N = 12
ROWS, KEYS = np.arange(N)[:, None], np.broadcast_to(np.arange(N), (N, N))
GAP, BLOCK = KEYS - ROWS, KEYS // 4 - ROWS // 4
FOUND = (
    ("band", (GAP >= -2) & (GAP <= 3)),
    ("causal", GAP <= 0),
    ("everything", GAP == GAP),
    ("diagonal", GAP == 0),
    ("blocks", BLOCK == 0),
    ("neighbouring blocks", (BLOCK >= -1) & (BLOCK <= 1)),
    ("causal blocks", (BLOCK >= -1) & (GAP <= 0)),
)
NONE = (
    ("every other key", (GAP % 2 == 0) & (abs(GAP) <= 4)),
    ("a hole", (abs(GAP) <= 2) & ~((ROWS == 5) & (KEYS == 6))),
    ("nothing", GAP != GAP),
)


@pytest.mark.parametrize(("name", "kept"), FOUND, ids=[name for name, _ in FOUND])
def test_the_condition_holds_for_exactly_the_kept_pairs(name: str, kept: np.ndarray) -> None:
    found = ex.canon(band(kept, KEYS, N, {4}))
    holds = [[found.subs({ex.q: q, ex.k: k}) == True for k in range(N)] for q in range(N)]  # noqa: E712
    assert np.array_equal(holds, kept)


@pytest.mark.parametrize(("name", "kept"), NONE, ids=[name for name, _ in NONE])
def test_what_is_no_band_is_unproven(name: str, kept: np.ndarray) -> None:
    with pytest.raises(Unproven):
        band(kept, KEYS, N, {4})


def test_a_key_may_take_part_once_in_a_row() -> None:
    with pytest.raises(Unproven, match="twice"):
        band(np.ones((N, 2), dtype=bool), np.broadcast_to(np.arange(N)[:, None], (N, 2)), N, set())
