"""The estimate of what skipping heads saves."""

from __future__ import annotations

from attnopt import expr as ex
from attnopt.mix.cost import estimate
from attnopt.spec import AttentionSpec, Heads

SPEC = AttentionSpec(Heads(8, 8, 8, 64, 64))
CAUSAL = AttentionSpec(Heads(8, 8, 8, 64, 64), keep=ex.k <= ex.q).canonical()


def test_long_inputs_pay_and_short_ones_do_not() -> None:
    assert estimate(SPEC, (1, 8, 1024, 64), 1024, 4, 512).pays
    assert not estimate(SPEC, (1, 8, 16, 64), 16, 4, 512).pays
    assert not estimate(SPEC, (1, 8, 1, 64), 1024, 6, 512).pays, "one token"


def test_savings_follow_the_share_and_the_mask() -> None:
    query = (1, 8, 1024, 64)
    half, most = estimate(SPEC, query, 1024, 4, 512), estimate(SPEC, query, 1024, 6, 512)
    assert half.saved == 2 * most.saved
    assert estimate(CAUSAL, query, 1024, 4, 512).saved == half.saved / 2
    assert "with 50% of the heads on" in str(half)
