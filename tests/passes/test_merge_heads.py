"""A graph with shared heads computes what the full graph computes with equal heads, from smaller parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.errors import Decline
from attnopt.passes import shared_heads
from attnopt.passes.merge_heads import Groups, Turns, share, weights
from attnopt.passes.stage import Stage
from attnopt.patterns import projections
from attnopt.patterns.projections import Projections
from attnopt.region import Region
from attnopt.spec import Heads
from tests.passes.tiny import HEADS, INNER, WIDTH, model, output, stage

LAYOUTS = ["separate", "concatenated", "interleaved", "conv", "grouped", "grouped-fused"]


def _parts(at: Stage) -> tuple[Region, Projections, dict[Any, Tensor]]:
    (region,) = at.regions.values()
    found = projections.find(region)
    assert isinstance(found, Projections), str(found)
    maps = (found.q, found.k, found.v, found.o)
    return region, found, {n: at.tensors[at.states[n]] for p in maps for n in (p.weight, p.bias) if n is not None}


def _turns(kv: int) -> Turns:
    draw = torch.Generator().manual_seed(7)
    k, v = (torch.linalg.qr(torch.randn(kv, WIDTH, WIDTH, dtype=torch.float64, generator=draw))[0] for _ in range(2))
    return Turns(k, v)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moved_and_rotated_heads_compute_the_same(layout: str) -> None:
    module, x = model(layout)
    at = stage(module, x)
    before = output(at)
    region, found, held = _parts(at)
    kv = region.spec.heads.k
    groups = Groups(((0, 3), (1, 2)) if kv == HEADS else ((1,), (0,)), moved=True)
    new = weights(found, region.spec.heads, groups, _turns(kv), held, merge=False)
    for node, tensor in new.items():
        assert tensor.shape == held[node].shape
        at.tensors[at.states[node]] = torch.nn.Parameter(tensor)
    assert any(not torch.equal(new[n], held[n]) for n in new)
    torch.testing.assert_close(output(at), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layout", "moved"), [*((x, True) for x in LAYOUTS), ("separate", False), ("conv", False)])
def test_shared_heads_are_equal_heads(layout: str, moved: bool) -> None:
    """Against the full graph in which every head of a group has the group's mean."""
    module, x = model(layout, rotary=True)
    at = stage(module, x)
    region, found, held = _parts(at)
    count = region.spec.heads.k
    groups = Groups(((0, 2), (1, 3)) if count == HEADS else ((0, 1),), moved)
    merged = weights(found, region.spec.heads, groups, None, held, merge=True)
    full = {node: tensor.clone() for node, tensor in merged.items()}
    for p in (found.k, found.v):
        for place, group in enumerate(groups.table):
            for node in (p.weight, p.bias):
                if node is not None:
                    rows = full[node].t() if p.transposed and full[node].dim() == 2 else full[node]
                    rows[list(p.rows[place])] = rows[list(p.rows[groups.kept[group]])].clone()
    for node, tensor in full.items():
        at.tensors[at.states[node]] = torch.nn.Parameter(tensor)
    expected = output(at)
    cuts = share(at.gm, region, found, groups)
    assert not isinstance(cuts, Decline)
    for node, tensor in merged.items():
        at.tensors[at.states[node]] = torch.nn.Parameter(tensor)
    for cut in cuts:
        at.cut(cut.placeholder, cut.dim, cut.keep)
    at.finish()
    torch.testing.assert_close(output(at), expected, rtol=1e-12, atol=1e-12)
    again = Stage(at.gm, at.calibration, at.tensors, {})
    (site,) = map(shared_heads.apply, again.regions.values())
    assert site.spec.heads.k == site.spec.heads.v == len(groups.members)
    read = Heads(HEADS, count, count, WIDTH, WIDTH).k_map
    assert site.spec.heads.k_map == tuple(groups.table[k] for k in read)
    sizes = {n: t.numel() for n, t in at.tensors.items()}
    saved = 2 * WIDTH * (count - len(groups.members)) * (INNER + (layout != "grouped"))
    assert sum(t.numel() for t in held.values()) - sum(sizes.values()) == saved


def test_query_heads_follow_their_keys() -> None:
    groups = Groups(((0, 2), (1, 3)), moved=True)
    assert groups.order == (0, 2, 1, 3)
    assert groups.table == (0, 0, 1, 1)
    assert groups.kept == (0, 2)
    assert groups.queries(Heads(8, 4, 4, 2, 2)) == (0, 1, 4, 5, 2, 3, 6, 7)
    held = Groups(((0, 2), (1, 3)), moved=False)
    assert (held.order, held.table, held.kept) == ((0, 1, 2, 3), (0, 1, 0, 1), (0, 1))
    assert held.queries(Heads(8, 4, 4, 2, 2)) == tuple(range(8))


def test_keys_that_are_used_elsewhere_are_left_alone() -> None:
    module, x = model("separate")
    at = stage(_Returned(module), x)
    region, made, _ = _parts(at)
    before = str(at.gm.graph)
    declined = share(at.gm, region, made, Groups(((0, 1), (2, 3)), moved=True))
    assert isinstance(declined, Decline)
    assert "used in another place" in str(declined)
    assert str(at.gm.graph) == before


class _Returned(torch.nn.Module):
    """Attention that returns its keys by head, as a cache does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, positions, features] to the same, and the keys."""
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, HEADS, WIDTH).transpose(1, 2) for p in (self.inner.q, self.inner.k, self.inner.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.inner.o(y.transpose(1, 2).reshape(B, S, INNER)), k
