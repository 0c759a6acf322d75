"""What each head gives and what it would be missed for, on calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.mix.tokens import Tokens
from attnopt.passes.stage import Seen, Stage
from attnopt.runtime.op import attention

# Tokens of one call, and of all calls of a site, that are looked at.
_PER_CALL, _MOST = 2048, 8192
# Of the mean of the squares of the features: keeps the fit defined where tokens have less rank than width.
_RIDGE = 1e-4


@dataclass
class Measured:
    """Samples of one site: for tokens t, head outputs `[t, H, d_v]`, norms of queries `[t, H]`, tokens `[t, width]`."""

    query: tuple[int, ...] = ()
    keys: int = 0
    outputs: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, seen: Seen) -> None:
        """Look at some tokens of one call."""
        if seen.q.numel() * seen.k.shape[2] > torch.Size(self.query).numel() * self.keys:
            self.query, self.keys = tuple(seen.q.shape), seen.k.shape[2]
        some = picked(seen.q.shape[0] * seen.q.shape[2], seen.q.device)
        out, _ = attention(seen.spec, seen.q, seen.k, seen.v, seen.captures, seen.scalars)
        self.outputs.append(out.transpose(1, 2).flatten(0, 1)[some].double())
        self.norms.append(seen.q.transpose(1, 2).flatten(0, 1)[some].double().norm(dim=-1))

    def mean(self) -> Tensor:
        """The mean output of each head, `[H, d_v]`."""
        return torch.cat(self.outputs).mean(0)

    def missed(self, columns: Sequence[Tensor]) -> Tensor:
        """`[t, H]`: how far the output projection's result moves if a head gives its mean; `columns[h] [out, d_v]`."""
        gap = torch.cat(self.outputs) - self.mean()
        return torch.stack([(gap[:, h] @ w.double().t()).norm(dim=-1) for h, w in enumerate(columns)], 1)


def picked(count: int, device: torch.device) -> Tensor:
    """Rows to look at of so many, evenly spread."""
    return torch.linspace(0, count - 1, min(count, _PER_CALL), dtype=torch.float64, device=device).long()


def measure(stage: Stage, nodes: Mapping[str, Tokens | None]) -> dict[str, Measured]:
    """Samples of the sites that are keys of `nodes`; of their tokens too, where there is a node."""
    found = {key: Measured() for key in nodes}

    def see(key: str, seen: Seen) -> None:
        if key in found and sum(map(len, found[key].outputs)) < _MOST:
            found[key].add(seen)

    stage.visit(see)
    by_node: dict[str, list[Measured]] = {}
    for key, tokens in nodes.items():
        if tokens is not None:
            by_node.setdefault(tokens.node.name, []).append(found[key])

    def keep(sites: list[Measured], value: Tensor) -> Tensor:
        rows = value.flatten(0, -2)
        for site in sites:
            if len(site.tokens) < len(site.outputs):
                site.tokens.append(rows[picked(len(rows), rows.device)].double())
        return value

    probes = {name: (lambda value, sites=sites: keep(sites, value)) for name, sites in by_node.items()}
    if probes:
        with torch.no_grad():
            for _ in stage.calibration.run(stage.gm, stage.tensors, probes):
                pass
    return found


def fitted(tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map from tokens `[t, width]` to `wanted [t, H]` of least squares: weight `[H, width]`, bias `[H]`.

    Ridge regression on centred features in fp64.
    """
    middle, level = tokens.mean(0), wanted.mean(0)
    features, targets = tokens - middle, wanted - level
    square = features.t() @ features
    ridge = _RIDGE * square.diagonal().mean() + torch.finfo(torch.float64).tiny
    square.diagonal().add_(ridge)
    weight = torch.linalg.solve(square, features.t() @ targets).t()
    return weight, level - weight @ middle
