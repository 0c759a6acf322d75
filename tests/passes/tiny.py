"""A small attention with every way of making heads, and a stage to rewrite it on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import attnopt.runtime.op  # noqa: F401 -- registers the operator that a stage emits
from attnopt.capture import Captured, capture, share
from attnopt.passes.approximate import Stage
from attnopt.passes.tolerance import Calibration
from attnopt.patterns import find, projections
from attnopt.patterns.projections import Projections
from attnopt.region import Region

HEADS, KV, WIDTH = 4, 2, 6
INNER = HEADS * WIDTH


class Attention(nn.Module):
    """`layout`: separate, concatenated, interleaved, conv (`[in, out]`), grouped, grouped-fused or shared-kv."""

    def __init__(self, layout: str, rotary: bool = False, norm: str = "", dropout: float = 0.0) -> None:
        super().__init__()
        self.layout, self.rotary, self.dropout = layout, rotary, dropout
        self.kv = {"grouped": KV, "grouped-fused": KV, "shared-kv": 1}.get(layout, HEADS)
        self.sizes = [INNER, self.kv * WIDTH, self.kv * WIDTH]
        if layout in ("concatenated", "interleaved", "grouped-fused", "shared-kv"):
            self.qkv = nn.Linear(INNER, sum(self.sizes))
        elif layout == "conv":
            self.weight = nn.Parameter(torch.randn(INNER, 3 * INNER) / 5)
            self.bias = nn.Parameter(torch.randn(3 * INNER))
        else:
            self.q, self.k, self.v = (nn.Linear(INNER, n, bias=layout != "grouped") for n in self.sizes)
        self.o = nn.Linear(INNER, INNER)
        self.norm = nn.RMSNorm(WIDTH if norm == "head" else INNER) if norm else None
        self.norm_kind = norm

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [batch, heads, positions, width]."""
        b, s, _ = x.shape
        if self.layout == "interleaved":
            q, k, v = self.qkv(x).view(b, s, HEADS, 3 * WIDTH).transpose(1, 2).chunk(3, -1)
            return q, k, v
        if self.layout == "conv":
            made = torch.addmm(self.bias, x.view(-1, INNER), self.weight).view(b, s, -1).split(INNER, 2)
        elif hasattr(self, "qkv"):
            made = self.qkv(x).split(self.sizes, -1)
        else:
            made = (self.q(x), self.k(x), self.v(x))
        q = self.norm(made[0]) if self.norm_kind == "whole" else made[0]
        return tuple(t.view(b, s, -1, WIDTH).transpose(1, 2) for t in (q, made[1], made[2]))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, features] to the same."""
        b, s, _ = x.shape
        q, k, v = self.heads(x)
        if self.norm_kind == "head":
            q, k = self.norm(q), self.norm(k)
        if self.rotary:
            angle = torch.arange(s, device=x.device, dtype=x.dtype)[:, None] * torch.ones(WIDTH, dtype=x.dtype)
            q, k = (t * angle.cos() + _half_turn(t) * angle.sin() for t in (q, k))
        if 1 < self.kv < HEADS:
            repeated = b, self.kv, HEADS // self.kv, s, WIDTH
            k, v = (t[:, :, None].expand(repeated).reshape(b, HEADS, s, WIDTH) for t in (k, v))
        weights = (q @ k.transpose(-1, -2) / WIDTH**0.5).softmax(-1)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        return self.o((weights @ v).transpose(1, 2).reshape(b, s, INNER))


def _half_turn(x: Tensor) -> Tensor:
    return torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), -1)


def model(layout: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """The attention in fp64, in evaluation mode, and an input."""
    torch.manual_seed(0)
    return Attention(layout, **options).double().eval(), torch.randn(2, 5, INNER, dtype=torch.float64)


def captured(module: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    """The module's graph in normal form."""
    return capture(share(module), args, kwargs)


def stage(module: nn.Module, *args: Any, **kwargs: Any) -> Stage:
    """The module's graph, ready to rewrite, with its sites."""
    found = captured(module, *args, **kwargs)
    tensors = {**found.constants, **dict(module.named_buffers())}
    tensors.update(module.named_parameters(remove_duplicate=False))
    return Stage(found.gm, Calibration.make(found, None, (args, kwargs)), tensors, {})


def output(at: Stage) -> Tensor:
    """What the stage's graph returns first."""
    with torch.no_grad():
        return next(iter(at.calibration.run(at.gm, at.tensors)))[0]


def zeroed(module: nn.Module, heads: dict[str, tuple[int, ...]], *args: Any, **kwargs: Any) -> nn.Module:
    """A copy whose output projections ignore these heads, by module path."""
    copied = copy.deepcopy(module)
    found = captured(copied, *args, **kwargs)
    names = dict(zip((n for n in found.gm.graph.nodes if n.op == "placeholder"), found.states, strict=False))
    for _, _, region in find(found.gm.graph, found.scalars):
        assert isinstance(region, Region)
        made = projections.find(region)
        assert isinstance(made, Projections), str(made)
        columns = [c for h in heads.get(region.module_path, ()) for c in made.o.rows[h]]
        with torch.no_grad():
            weight = copied.get_parameter(names[made.o.weight])
            (weight if made.o.transposed else weight.t())[columns] = 0
    return copied
