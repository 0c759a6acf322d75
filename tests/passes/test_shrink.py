"""A graph with heads removed computes what the graph computes with those heads zeroed, from smaller parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.errors import Decline
from attnopt.passes.shrink import remove
from attnopt.patterns import find, projections
from attnopt.patterns.projections import Projections
from attnopt.region import Region
from tests.passes.tiny import HEADS, INNER, KV, WIDTH, model, output, stage, zeroed

LAYOUTS = ("separate", "concatenated", "conv", "interleaved", "grouped", "grouped-fused", "shared-kv")


@pytest.mark.parametrize("removed", [(1,), (2, 3), (0, 1, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_removed_equals_zeroed(layout: str, removed: tuple[int, ...]) -> None:
    module, x = model(layout, rotary=layout != "conv")
    at = stage(module, x)
    ((key, region),) = at.regions.items()
    found = projections.find(region)
    assert isinstance(found, Projections)
    cuts = remove(at.gm, region, found, removed)
    assert not isinstance(cuts, Decline), str(cuts)
    for cut in cuts:
        at.cut(cut.placeholder, cut.dim, cut.keep)
    at.gm.graph.lint()
    at.gm.recompile()
    with torch.no_grad():
        expected = zeroed(module, {key: removed}, x)(x)
    # Two fp64 sums of the same terms, where the zeroed one adds zeros in between.
    torch.testing.assert_close(output(at), expected, rtol=1e-12, atol=1e-12)
    before = sum(p.numel() for p in module.parameters())
    assert before - sum(t.numel() for t in at.tensors.values()) == _expected_savings(layout, removed)


def _expected_savings(layout: str, removed: tuple[int, ...]) -> int:
    """Rows of q and columns of o for each head; rows of k and v for each key head without a query head."""
    row = INNER + (layout != "grouped")
    per = {"grouped": HEADS // KV, "grouped-fused": HEADS // KV, "shared-kv": HEADS}.get(layout, 1)
    gone = sum(all(per * g + i in removed for i in range(per)) for g in range(HEADS // per))
    return len(removed) * WIDTH * (row + INNER) + gone * WIDTH * 2 * row


@pytest.mark.parametrize("removed", [(1,), (0, 1), (0, 2)])
def test_the_site_is_found_again_with_fewer_heads(removed: tuple[int, ...]) -> None:
    module, x = model("grouped")
    at = stage(module, x)
    (region,) = at.regions.values()
    remove(at.gm, region, projections.find(region), removed)  # type: ignore[arg-type]
    ((anchor, _, again),) = find(at.gm.graph)
    assert isinstance(again, Region)
    assert again.spec.heads.q == HEADS - len(removed)
    assert anchor.name == region.anchor.name
    assert anchor.meta["attnopt_rewrites"] == ("prune_heads",)


def test_projections_that_something_else_reads_are_declined_and_the_graph_is_as_before() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(INNER, INNER) for _ in range(4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v = (f(x).view(2, 5, HEADS, WIDTH).transpose(1, 2) for f in (self.q, self.k, self.v))
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(out.transpose(1, 2).reshape(2, 5, INNER)), k

    at = stage(Cached(), torch.randn(2, 5, INNER))
    (region,) = at.regions.values()
    before = str(at.gm.graph)
    result = remove(at.gm, region, projections.find(region), (0,))  # type: ignore[arg-type]
    assert isinstance(result, Decline)
    assert "used in another place" in result.reason
    assert str(at.gm.graph) == before
