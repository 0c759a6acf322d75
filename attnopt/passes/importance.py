"""How much each head matters, measured on calibration inputs or read off the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attnopt.errors import OptionError
from attnopt.passes.tolerance import Calibration
from attnopt.patterns.projections import Projections
from attnopt.region import Region

Tensors = Mapping[str, torch.Tensor]
Candidate = tuple[Region, Projections]


def gradient(
    gm: fx.GraphModule, tensors: Tensors, sites: Sequence[Candidate], calibration: Calibration
) -> list[list[float]]:
    """`|head output . d loss / d head output|` summed over the examples (Michel et al. 2019)."""
    totals = [torch.zeros(region.spec.heads.q, dtype=torch.float64) for region, _ in sites]
    seen: dict[str, torch.Tensor] = {}

    def probe(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def mark(x: torch.Tensor) -> torch.Tensor:
            seen[name] = x if x.requires_grad else x.detach().requires_grad_()
            return seen[name]

        return mark

    names = [region.output.name for region, _ in sites]
    with torch.enable_grad():
        runs = calibration.run(gm, tensors, {name: probe(name) for name in names})
        for flat, batch in zip(runs, calibration.batches, strict=True):
            outputs, loss = [seen[name] for name in names], calibration.loss(flat, batch)
            if not loss.requires_grad:
                raise OptionError(
                    "PruneHeads(score='gradient') needs a loss that has a gradient, and this one has none: keep it a "
                    "tensor that is computed from the output, or take score='ablation'."
                )
            grads = torch.autograd.grad(loss, outputs, allow_unused=True)
            for (region, _), total, output, grad in zip(sites, totals, outputs, grads, strict=True):
                if grad is not None:
                    product = (output.detach() * grad).double()
                    total += by_head(product, region).abs().sum(0).cpu()
            seen.clear()
    return [_normalised(total) for total in totals]


def ablation(
    gm: fx.GraphModule, tensors: Tensors, sites: Sequence[Candidate], calibration: Calibration
) -> list[list[float]]:
    """The relative change of the model's output when one head's output is zero."""
    before = calibration.baseline(gm, tensors)
    found = []
    for region, _ in sites:
        scores = []
        for head in range(region.spec.heads.q):
            probes = {region.output.name: zeroed(region, [head])}
            scores.append(calibration.change(before, gm, tensors, probes).output)
        found.append(scores)
    return found


def magnitude(
    gm: fx.GraphModule, tensors: Tensors, sites: Sequence[Candidate], calibration: Calibration
) -> list[list[float]]:
    """The norm of a head's value rows times that of its output columns: a bound on what it can write."""
    names = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), calibration.states, strict=False))
    found = []
    for region, p in sites:
        v, o = (tensors[names[x.weight]].detach().double() for x in (p.v, p.o))
        v, o = (v.t() if p.v.transposed else v), (o if p.o.transposed else o.t())
        scores = [
            (v[list(p.v.rows[region.spec.heads.v_map[h]])].norm() * o[list(p.o.rows[h])].norm()).item()
            for h in range(region.spec.heads.q)
        ]
        found.append(_normalised(torch.tensor(scores, dtype=torch.float64)))
    return found


SCORES: dict[str, Callable[[fx.GraphModule, Tensors, Sequence[Candidate], Calibration], list[list[float]]]] = {
    "gradient": gradient,
    "ablation": ablation,
    "magnitude": magnitude,
}


def _normalised(scores: torch.Tensor) -> list[float]:
    """Divided by the layer's l2 norm, so that layers compare."""
    norm = scores.norm()
    return list((scores / norm if norm > 0 else scores).tolist())


def _unfolded(x: torch.Tensor, region: Region) -> tuple[torch.Tensor, list[str]]:
    """The output with one dimension a coordinate, and their names."""
    names: list[str] = []
    for folded in region.out_dims:
        if len(folded) > 1:
            x = torch.unflatten(x, len(names), (-1, region.spec.heads.q))
        names.extend(folded)
    return x, names


def by_head(x: torch.Tensor, region: Region) -> torch.Tensor:
    """The sums of a tensor of the output's layout over positions and features, as `[examples, heads]`."""
    x, names = _unfolded(x, region)
    if "h" not in names:
        x, names = x.unsqueeze(-1), [*names, "h"]
    gone = [i for i, n in enumerate(names) if n in ("q", "d")]
    left = [n for n in names if n not in ("q", "d")]
    return x.sum(gone).movedim(left.index("h"), -1).reshape(-1, region.spec.heads.q)


def zeroed(region: Region, heads: Sequence[int]) -> Callable[[Any], Any]:
    """A function that zeroes these heads of the attention's output."""

    def zero(x: torch.Tensor) -> torch.Tensor:
        wide, names = _unfolded(x, region)
        mask = torch.ones(region.spec.heads.q, dtype=x.dtype, device=x.device)
        mask[list(heads)] = 0
        shape = [-1 if n == "h" else 1 for n in names]
        return (wide * mask.view(shape)).reshape(x.shape)

    return zero
