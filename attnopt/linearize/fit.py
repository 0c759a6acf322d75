"""Learned feature maps, fitted to the weights of the attention that they replace.

The cross-entropy between a row's softmax weights and its linear ones, over sampled rows of the calibration inputs,
falls under Adam (Zhang et al., The Hedgehog and the Porcupine, 2024; attention transfer of LoLCATs, 2024). Every site
is fitted alone, to what the unchanged model gives it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy as sp
import torch
from rich.console import Console
from rich.progress import Progress
from sympy.logic.boolalg import Boolean
from torch import Tensor

from attnopt import expr as ex
from attnopt.linearize.features import FeatureMap, eager
from attnopt.passes.stage import Seen, Stage
from attnopt.runtime.reference import Sample
from attnopt.runtime.weights import weights
from attnopt.spec import AttentionSpec

# Entries of the calibration inputs that are kept of a site, and query rows of one step.
_ENTRIES, _ROWS = 8, 64
_RATE = 1e-2


@dataclass(frozen=True)
class Example:
    """One batch entry that a site was given: q `[1, Hq, n_q, d]` and k `[1, Hk, n_k, d]` in fp32."""

    seen: Seen
    q: Tensor
    k: Tensor
    entry: int


@dataclass(frozen=True)
class Fit:
    """The weights of a site's maps: query `[Hq, d, f]`, key `[Hk, d, f]`, and balance `[Hq, 1, 1]`.

    `balance` is the logarithm of a factor of the linear weights, which counts beside a softmax window only.
    `losses` are the cross-entropies of the steps, in nats a row.
    """

    query: Tensor
    key: Tensor
    balance: Tensor
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Recipe:
    """How maps are fitted: the map, its features `f` a head (None: the head's width), Adam steps, the window."""

    map: FeatureMap
    features: int | None
    steps: int
    seed: int
    progress: bool
    window: int | None = None


def collect(stage: Stage, keys: Collection[str]) -> dict[str, list[Example]]:
    """What the sites are given on the calibration inputs."""
    found: dict[str, list[Example]] = {key: [] for key in keys}

    def see(key: str, seen: Seen) -> None:
        for b in range(seen.q.shape[0] if key in found else 0):
            if len(found[key]) < _ENTRIES and seen.q.shape[2] and seen.k.shape[2]:
                q, k = (t[b : b + 1].detach().float().clone() for t in (seen.q, seen.k))
                found[key].append(Example(seen, q, k, b))

    stage.visit(see)
    return found


def fit_all(examples: Mapping[str, Sequence[Example]], recipe: Recipe) -> dict[str, Fit]:
    """The maps of every site."""
    console = Console(stderr=True)
    hidden = not recipe.progress or not sys.stderr.isatty()
    found = {}
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("fitting feature maps", total=len(examples) * recipe.steps)
        for key, given in examples.items():
            found[key] = fit(given, recipe, lambda: bar.advance(task))
    return found


def fit(examples: Sequence[Example], recipe: Recipe, advance: object = None) -> Fit:
    """The maps of one site. The same examples and recipe give the same maps."""
    spec = examples[0].seen.spec
    draw = torch.Generator().manual_seed(recipe.seed)
    query, key = start(spec, recipe.features)
    # Features of small inputs have products of about two each, their exponentials of about one.
    balance = torch.full((spec.heads.q, 1, 1), -math.log(2 * query.shape[2]))
    near = None if recipe.window is None else near_keys(spec.keep, recipe.window)
    losses = []
    # The rewrite may run where gradients are off, or in the middle of the user's own recording.
    with torch.enable_grad():
        leaves = [query.requires_grad_(), key.requires_grad_(), balance.requires_grad_()]
        adam = torch.optim.Adam(leaves, lr=_RATE)
        for step in range(recipe.steps):
            adam.param_groups[0]["lr"] = _RATE * (1.0 - step / recipe.steps)
            one = examples[int(torch.randint(len(examples), (), generator=draw))]
            rows = torch.randperm(one.q.shape[2], generator=draw)[:_ROWS].sort().values
            loss = cross_entropy(one, recipe.map, (query, key, balance), rows, near)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            losses.append(float(loss.detach()))
            if callable(advance):
                advance()
    return Fit(query.detach(), key.detach(), balance.detach(), tuple(losses))


def start(spec: AttentionSpec, features: int | None = None) -> tuple[Tensor, Tensor]:
    """Where the fit starts: both maps scale their input so that `u . w` is the score, as far as f reaches."""
    heads = spec.heads
    factor = abs(float(spec.score / ex.s)) ** 0.5
    width = features or heads.d_qk
    one = torch.eye(heads.d_qk, width) * factor
    return one.repeat(heads.q, 1, 1), one.repeat(heads.k, 1, 1)


def near_keys(keep: Boolean, window: int) -> Boolean | None:
    """The condition of the last `window` keys that a causal mask keeps; None for another mask."""
    for clause in ex.conjuncts(ex.canon(keep)):
        if ex.depends(clause, ex.q) and isinstance(clause, sp.Ge):
            return ex.canon(clause.args[0] < window)
    return None


def cross_entropy(
    one: Example, made: FeatureMap, learned: tuple[Tensor, Tensor, Tensor], rows: Tensor, near: Boolean | None = None
) -> Tensor:
    """Mean over rows and heads of `-sum_k p log p'`: p the softmax weights, p' the linear ones of the same keys.

    Where `near` holds, the weights before they are normalised are those of the softmax.
    """
    seen, (query, key, balance) = one.seen, learned
    sample = Sample(batch=torch.tensor([one.entry]), rows=rows, whole_batch=seen.q.shape[0])
    with torch.no_grad():
        true, kept, scores = weights(seen.spec, one.q, one.k, seen.captures, seen.scalars, sample)
    features = made.make(eager, one.k, key)[:, list(seen.spec.heads.k_map)]
    linear = made.make(eager, one.q[:, :, rows], query) @ features.transpose(-1, -2)
    logs = linear.clamp_min(1e-12).log() + balance
    if near is not None:
        spec = replace(seen.spec, keep=near)
        with torch.no_grad():
            beside = weights(spec, one.q, one.k, seen.captures, seen.scalars, sample)[1]
        logs = torch.where(beside, scores * float(seen.spec.score / ex.s), logs)
    logs = logs.masked_fill(~kept, -1e30)
    return -(true * (logs - logs.logsumexp(-1, keepdim=True)).masked_fill(~kept, 0.0)).sum(-1).mean()
