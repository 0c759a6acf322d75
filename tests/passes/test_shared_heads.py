"""Copied key heads become a head map."""

from __future__ import annotations

from attnopt.passes import shared_heads
from attnopt.passes.shrink import remove
from attnopt.patterns import find, projections
from attnopt.region import Region
from tests.passes.tiny import model, stage


def _region(removed: tuple[int, ...]) -> Region:
    module, x = model("grouped")
    at = stage(module, x)
    (region,) = at.regions.values()
    remove(at.gm, region, projections.find(region), removed)  # type: ignore[arg-type]
    ((_, _, again),) = find(at.gm.graph)
    assert isinstance(again, Region)
    return again


def test_an_uneven_table_becomes_the_map() -> None:
    before = _region((1,))
    after = shared_heads.apply(before)
    assert (before.spec.heads.k, before.spec.heads.k_map) == (3, (0, 1, 2))
    assert (after.spec.heads.k, after.spec.heads.k_map, after.spec.heads.v_map) == (2, (0, 1, 1), (0, 1, 1))
    assert after.key.node is before.key.node.args[0]
    after.spec.verify()


def test_without_a_table_the_region_is_the_same_object() -> None:
    region = _region((0, 1))
    assert shared_heads.apply(region) is region
