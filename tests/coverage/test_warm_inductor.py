from __future__ import annotations

from attnopt.coverage.warm_inductor import warm


def test_the_matcher_is_warm_and_finds_the_plainest_attention() -> None:
    assert warm() == 1
