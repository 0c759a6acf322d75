"""How recognition and rewriting grow with the depth of a model, capture excluded.

    python benchmarks/scale.py                       # 12, 24, 48 and 96 layers, on one thread
    python benchmarks/scale.py --layers 96 --profile # where the time goes

The model is a decoder written in plain torch (rotary positions, repeated key heads, hand-written RMS norms also on
queries and keys, a mask that every layer builds for itself), so that one layer is more than a hundred nodes; widths
are tiny, since only the graph matters. Every depth is captured once; finding and lowering are timed on fresh copies,
in processor seconds of one thread, which other load on the machine changes little.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import math
import pstats
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from attnopt import pipeline
from attnopt.capture import Captured, capture
from attnopt.options import Options
from attnopt.region import Region

HEADS, KEY_HEADS, WIDTH, TOKENS = 4, 2, 8, 16


class Norm(nn.Module):
    """RMS norm in single steps, computed in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, N, C]` to the same shape."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: `x [B, H, N, D]`, `cos` and `sin` `[B, N, D]`."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def repeat(x: Tensor, times: int) -> Tensor:
    """Every key head `times` times: `[B, H, N, D]` to `[B, H * times, N, D]`."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


class Layer(nn.Module):
    """Attention and a gated feed-forward part, each behind a norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, HEADS * WIDTH, bias=False)
        self.key = nn.Linear(size, KEY_HEADS * WIDTH, bias=False)
        self.value = nn.Linear(size, KEY_HEADS * WIDTH, bias=False)
        self.out = nn.Linear(HEADS * WIDTH, size, bias=False)
        self.gate, self.up, self.down = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.before, self.after = Norm(size), Norm(size)
        self.query_norm, self.key_norm = Norm(WIDTH), Norm(WIDTH)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, keep: Tensor) -> Tensor:
        """Causal attention over the keys that `keep [B, N]` allows."""
        q, k, v = (made(x).view(*x.shape[:2], -1, WIDTH).transpose(1, 2) for made in (self.query, self.key, self.value))
        q, k = rotate(self.query_norm(q), cos, sin), rotate(self.key_norm(k), cos, sin)
        k, v = repeat(k, HEADS // KEY_HEADS), repeat(v, HEADS // KEY_HEADS)
        place = torch.arange(x.shape[1])
        mask = (place[None, :] <= place[:, None])[None, None] & keep[:, None, None, :].bool()
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(WIDTH)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.out(mixed.reshape(*x.shape[:2], -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keep: Tensor) -> Tensor:
        """`x [B, N, C]` to the same shape."""
        x = x + self.attend(self.before(x), cos, sin, keep)
        y = self.after(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A stack of equal layers over embedded tokens."""

    def __init__(self, layers: int, size: int = 16, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(size) for _ in range(layers))
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        """`ids [B, N]` int64 and `keep [B, N]` (1 is a token, 0 is padding) to logits `[B, N, vocabulary]`."""
        place = torch.arange(ids.shape[1])[None, :, None].float()
        angles = place * (10000.0 ** (-torch.arange(0, WIDTH, 2).float() / WIDTH))
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, keep)
        return self.head(x)


@dataclass(frozen=True)
class Row:
    """What one depth took: seconds, and what was found."""

    layers: int
    nodes: int
    find: float
    lower: float
    fused: int
    specs: int

    @property
    def total(self) -> float:
        """Seconds for finding and lowering."""
        return self.find + self.lower


def make(layers: int) -> Captured:
    """The captured graph of this depth."""
    ids, keep = torch.ones(2, TOKENS, dtype=torch.int64), torch.ones(2, TOKENS, dtype=torch.int64)
    with torch.no_grad():
        return capture(Decoder(layers).eval(), (ids, keep), {})


def copied(captured: Captured) -> fx.GraphModule:
    """A copy of the graph that may be changed."""
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(captured.gm.graph, {}))
    return fx.GraphModule(captured.gm, fresh)


def measure(captured: Captured, layers: int) -> Row:
    """Find and lower once, timed apart."""
    gm = copied(captured)
    nodes = len(gm.graph.nodes)
    gc.collect()
    start = time.process_time()
    found = pipeline.find(gm.graph, captured.scalars, Options())
    middle = time.process_time()
    found = pipeline.lower(gm, found)
    end = time.process_time()
    regions = [f.result for f in found if isinstance(f.result, Region)]
    return Row(layers, nodes, middle - start, end - middle, len(regions), len({r.spec.key for r in regions}))


def main() -> None:
    """Measure every depth and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--repeats", type=int, default=3, help="the median is shown")
    parser.add_argument("--profile", action="store_true", help="show where the deepest one spends its time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(make(1), 1)  # what is imported and compiled on first use is no cost of the graph
    print("layers   nodes   find s  lower s  total s   s per 1,000 nodes   fused   distinct specs (kernels)")
    for layers in arguments.layers:
        captured = make(layers)
        if arguments.profile and layers == max(arguments.layers):
            with cProfile.Profile() as profile:
                measure(captured, layers)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        rows = [measure(captured, layers) for _ in range(arguments.repeats)]
        row = sorted(rows, key=lambda r: r.total)[len(rows) // 2]
        per = row.total / row.nodes * 1000
        print(
            f"{row.layers:6} {row.nodes:7} {row.find:8.2f} {row.lower:8.2f} {row.total:8.2f} {per:19.3f}"
            f" {row.fused:7} {row.specs:16}",
            flush=True,
        )
        assert row.fused == layers, "every layer's attention is fused"
        assert statistics.fmean(r.specs for r in rows) == 1, "equal layers share one spec"


if __name__ == "__main__":
    main()
