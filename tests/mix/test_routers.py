"""Gates from scores: which heads are on, and the gradient."""

from __future__ import annotations

import pytest
import torch

from attnopt.mix.routers import Router
from attnopt.region import Region
from attnopt.runtime import op  # noqa: F401  (registers attnopt::attention)
from tests.passes.tiny import HEADS, model, output, stage


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_shared_heads_and_the_best_of_the_others(active: int, learned: bool) -> None:
    module, x = model("separate")
    at = stage(module, x)
    (key,) = at.regions
    region = at.plain(key)
    assert isinstance(region, Region)
    router = Router(at, region.anchor, region.query.node)
    ones = torch.ones(HEADS, 1, dtype=torch.float64)
    shared = at.add(key, "shared", lambda: torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=torch.float64))
    scores = router.norms(at.add(key, "scale", lambda: ones))
    gate = router.gate(scores, shared, active, learned)
    (end,) = (n for n in at.gm.graph.nodes if n.op == "output")
    end.args = ((gate,),)
    at.finish()
    found = output(at)
    norms = module.heads(x)[0].norm(dim=-1)
    for b in range(2):
        for n in range(5):
            others = sorted((h for h in range(HEADS) if h != 1), key=lambda h: -norms[b, h, n])
            assert found[b, :, n].nonzero().flatten().tolist() == sorted([1, *others[:active]])
    assert bool(((found == 0) | (found == 1)).all())
