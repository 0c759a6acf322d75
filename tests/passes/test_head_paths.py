"""What RoPE, norms and gains let through is found by trying, in every layout of heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnopt.passes import head_paths
from attnopt.passes.align import Freedom
from attnopt.passes.head_paths import Side
from attnopt.patterns import projections
from attnopt.patterns.projections import Projections
from tests.passes.tiny import HEADS, INNER, WIDTH, model, stage

Change = Callable[[Tensor], Tensor]


class Rotary(nn.Module):
    """Attention whose queries and keys `[B, H, S, d]` go through a function."""

    def __init__(self, change: Change, after: Change | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(INNER, INNER) for _ in range(4))
        self.change, self.after = change, after

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, features] to the same."""
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, HEADS, WIDTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.change(q), self.change(k), v)
        y = y if self.after is None else self.after(y)
        return self.o(y.transpose(1, 2).reshape(B, S, INNER))


def _angles(x: Tensor, count: int) -> Tensor:
    places = torch.arange(x.shape[-2], dtype=x.dtype)
    return places[:, None] * torch.tensor([1.0, 0.3, 0.05], dtype=x.dtype)[:count]


def half_split(x: Tensor, count: int = 3) -> Tensor:
    """RoPE over the first `2 count` features: feature i with i + count."""
    angle = _angles(x, count)
    a, b, rest = x.split([count, count, WIDTH - 2 * count], -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), -1)


def interleaved(x: Tensor) -> Tensor:
    """RoPE over neighbours: feature 2 i with 2 i + 1."""
    angle = _angles(x, 3)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).flatten(-2)


def _gain(x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (WIDTH,)) * torch.arange(1.0, WIDTH + 1, dtype=x.dtype)


def _sides(module: nn.Module, x: Tensor) -> tuple[Side, Side, Side, Side]:
    at = stage(module.double().eval(), x)
    (region,) = at.regions.values()
    found = projections.find(region)
    assert isinstance(found, Projections), str(found)
    operands = (region.query, region.key, region.value)
    ends = [(p.node, o.node) for p, o in zip((found.q, found.k, found.v), operands, strict=True)]
    ends.append((region.output, found.o.input))
    *paths, last = head_paths.seen(at.gm, at.tensors, at.calibration, ends)
    made = zip(paths, (found.q, found.k, found.v), operands, strict=True)
    q, k, v = (head_paths.into(path, p.rows, operand.dims) for path, p, operand in made)
    return q, k, v, head_paths.out_of(last, found.o.rows, region)


ALL = (tuple(range(WIDTH)),)
CASES = {
    "nothing": (lambda x: x, Freedom(free=ALL)),
    "scale": (lambda x: 0.3 * x, Freedom(free=ALL)),
    "half-split": (half_split, Freedom(planes=((0, 3), (1, 4), (2, 5)))),
    "interleaved": (interleaved, Freedom(planes=((0, 1), (2, 3), (4, 5)))),
    "partial": (lambda x: half_split(x, 2), Freedom(planes=((0, 2), (1, 3)), free=((4, 5),))),
    "norm and rotation": (lambda x: half_split(nn.functional.rms_norm(x, (WIDTH,))), Freedom(((0, 3), (1, 4), (2, 5)))),
    "gains": (_gain, Freedom()),
    "two gains": (lambda x: x * torch.tensor([1.0, 1, 1, 1, 2, 2], dtype=x.dtype), Freedom(free=((0, 1, 2, 3), (4, 5)))),
    "mixed": (lambda x: x.flip(-1).cumsum(-1), Freedom()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_rotations_that_scores_do_not_see(name: str) -> None:
    change, expected = CASES[name]
    torch.manual_seed(0)
    q, k, _, _ = _sides(Rotary(change), torch.randn(2, 5, INNER, dtype=torch.float64))
    assert q.uniform()
    assert k.uniform()
    found = head_paths.freedom(q.response(), k.response())
    assert found == expected
    assert head_paths.scores_keep(q, k, head_paths.any_rotation(WIDTH, found))
    if not found.size:
        assert not head_paths.scores_keep(q, k, head_paths.any_rotation(WIDTH, Freedom(free=ALL)))


def test_a_rotation_across_planes_is_seen_in_the_scores() -> None:
    torch.manual_seed(0)
    q, k, _, _ = _sides(Rotary(half_split), torch.randn(2, 5, INNER, dtype=torch.float64))
    assert not head_paths.scores_keep(q, k, head_paths.any_rotation(WIDTH, Freedom(free=ALL)))
    assert not head_paths.scores_keep(q, k, head_paths.any_rotation(WIDTH, CASES["interleaved"][1]))


@pytest.mark.parametrize("layout", ["separate", "concatenated", "interleaved", "conv", "grouped", "grouped-fused"])
def test_values_may_be_rotated_at_will_in_every_layout(layout: str) -> None:
    q, k, v, o = _sides(*model(layout, rotary=True))
    assert q.uniform()
    assert k.uniform()
    assert v.uniform()
    assert o.uniform()
    found = head_paths.freedom(o.response().transpose(-1, -2), v.response())
    assert found == Freedom(free=ALL)
    assert head_paths.outputs_keep(v, o, head_paths.any_rotation(WIDTH, found))


def test_a_norm_behind_attention_and_gains_of_heads_are_seen() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, INNER, dtype=torch.float64)
    *_, v, o = _sides(Rotary(lambda t: t, after=_gain), x)
    assert not head_paths.outputs_keep(v, o, head_paths.any_rotation(WIDTH, Freedom(free=ALL)))
    gains = torch.arange(1.0, HEADS + 1, dtype=torch.float64)[:, None, None]
    q, _, _, o = _sides(Rotary(lambda t: t * gains, after=lambda t: t * gains), x)
    assert not q.uniform()
    assert not o.uniform()
