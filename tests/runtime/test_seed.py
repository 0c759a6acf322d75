"""Which tensor is a seed."""

from __future__ import annotations

import torch

from attnopt.runtime.seed import seeded
from attnopt.spec import AttentionSpec, Capture, Heads

HEADS = Heads(2, 2, 2, 4, 4)
SEED, BIAS = torch.tensor(7), torch.ones(2)


def test_a_seed_becomes_the_last_scalar() -> None:
    spec = AttentionSpec(HEADS, dropout=0.5, captures=(Capture("bias", "float", (2,)),), scalars=("n",))
    captures, scalars = seeded([BIAS, SEED], [3], lambda: spec)
    assert (captures[0] is BIAS, len(captures), scalars) == (True, 1, [3, 7])


def test_captures_of_a_spec_stay() -> None:
    dropped = AttentionSpec(HEADS, dropout=0.5, captures=(Capture("ids", "int", ()),))
    kept = AttentionSpec(HEADS, captures=(Capture("ids", "int", ()),))
    for spec in (dropped, kept):
        assert seeded([SEED], [], lambda spec=spec: spec) == ([SEED], [])
    assert seeded([BIAS], [1], lambda: dropped) == ([BIAS], [1])
    assert seeded([], [1], lambda: dropped) == ([], [1])
