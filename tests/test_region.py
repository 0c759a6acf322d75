"""A region is a value: changing it makes another."""

from __future__ import annotations

from tests.patterns.test_site import K, Q, region


def test_replace_leaves_the_region() -> None:
    found = region(lambda q, k: (q @ k.mT).softmax(-1) @ k, Q, K)
    other = found.replace(rewrites=("one",))
    assert (found.rewrites, other.rewrites) == ((), ("one",))
    assert other.spec is found.spec
    assert found.output in found.inner
    assert found.query.node not in found.inner
