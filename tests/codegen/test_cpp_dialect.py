"""Every cast that the printer may ask for exists."""

from __future__ import annotations

from attnopt.codegen.cpp_dialect import CPP
from attnopt.codegen.printer import KINDS


def test_every_widening_has_a_cast() -> None:
    for low, kind in enumerate(KINDS):
        for wider in KINDS[low + 1 :]:
            assert (kind, wider, False) in CPP.casts
            assert (kind, wider, True) in CPP.casts
    assert set(CPP.splats) == set(KINDS)
