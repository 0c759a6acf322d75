"""`PruneHeads`: remove the attention heads that matter least, with their rows and columns of the projections."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnopt.errors import Decline, OptionError
from attnopt.passes.approximate import Decision
from attnopt.passes.base import APPROX, Approx
from attnopt.passes.importance import SCORES
from attnopt.passes.shrink import remove
from attnopt.passes.stage import Sites, Stage
from attnopt.passes.tolerance import Loss
from attnopt.patterns import projections
from attnopt.region import Region


@dataclass(frozen=True)
class PruneHeads:
    """Remove attention heads; the result equals the model with those heads' outputs set to zero.

    Rows of the query projection and columns of the output projection go with every head; a key-value head goes
    when no query head is left that uses it. Give either `heads` or `fraction`.

    Attributes:
        heads: exactly which: module path, or number of the site in the report, to query head numbers.
        fraction: remove this part of all heads, the least important over all sites, never all of one site.
        score: what importance is: `gradient`, `ablation` (both measured on the calibration inputs) or `magnitude`.
        sites: which sites to consider with `fraction`: module paths, patterns of them such as `layers.*.attn`,
            numbers in the report, or a function of module path and spec; None means all.
        loss: scalar loss of the model's output; None means its `.loss`, else the mean square of its first
            floating tensor.

    Raises:
        OptionError: for arguments that do not fit, and, once the model is known, for sites or heads that are not there.
    """

    heads: Mapping[str | int, Sequence[int]] | None = None
    fraction: float | None = None
    score: str = "gradient"
    sites: Sites = None
    loss: Loss | None = None
    name: str = field(default="prune_heads", init=False)
    contract: Approx = field(default=APPROX, init=False)
    requires: frozenset[str] = field(default=frozenset(), init=False)
    provides: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        if (self.heads is None) == (self.fraction is None):
            raise OptionError("PruneHeads needs either heads={module path: [head, ...]} or fraction=0.25.")
        if self.score not in SCORES:
            raise OptionError(f"PruneHeads(score={self.score!r}) is unknown; choose one of {', '.join(SCORES)}.")
        if self.fraction is not None:
            number = isinstance(self.fraction, (int, float)) and not isinstance(self.fraction, bool)
            if not number or not 0 < self.fraction < 1:
                raise OptionError(f"PruneHeads(fraction={self.fraction!r}) must be a number between 0 and 1.")
        if self.heads is not None:
            if self.sites is not None:
                raise OptionError("PruneHeads takes sites= only with fraction=; heads= names its own.")
            if not isinstance(self.heads, Mapping) or not self.heads:
                raise OptionError(f"PruneHeads(heads=...) must map module paths to head numbers, not {self.heads!r}.")

    def decide(self, stage: Stage) -> Decision:
        """Which heads of which sites go. Measures importance if asked to; changes nothing."""
        if self.heads is not None:
            return self._named(stage, self.heads)
        allowed = set(stage.choose(self.sites, self.name))
        candidates, declines = [], []
        for key, region in stage.regions.items():
            if key not in allowed:
                continue
            made = projections.find(region)
            if isinstance(made, Decline):
                declines.append((key, str(made)))
            elif region.spec.heads.q > 1:
                candidates.append((key, (region, made)))
        if not candidates:
            return _decision(self.name, (), declines)
        found = SCORES[self.score](stage.gm, stage.tensors, [c for _, c in candidates], stage.calibration)
        scores = dict(zip((key for key, _ in candidates), found, strict=True))
        unknown = [key for key, numbers in scores.items() if not all(map(math.isfinite, numbers))]
        declines += [(key, f"the {self.score} of its heads is no finite number") for key in unknown]
        removed = _least({key: x for key, x in scores.items() if key not in unknown}, self.fraction or 0.0)
        return _decision(self.name, removed.items(), declines)

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        """Remove the decided heads from the stage's graph and tensors. Returns why sites were left, by site."""
        left = {}
        for key, heads in decision.sites:
            region = stage.regions.get(key)
            found = Decline("the site is not recognised") if region is None else projections.find(region)
            if region is not None and not isinstance(found, Decline):
                shared = stage.shared(p for x in (found.q, found.k, found.v, found.o) for p in (x.weight, x.bias) if p)
                found = Decline(f"parameter {shared} is used under several names") if shared else found
            if region is not None and not isinstance(found, Decline):
                cuts = remove(stage.gm, region, found, heads)
                if not isinstance(cuts, Decline):
                    for cut in cuts:
                        stage.cut(cut.placeholder, cut.dim, cut.keep)
                    continue
                found = cuts
            left[key] = str(found)
        stage.gm.graph.lint()
        stage.gm.recompile()
        return left

    def _named(self, stage: Stage, wanted: Mapping[str | int, Sequence[int]]) -> Decision:
        sites, declines = [], []
        for given, numbers in wanted.items():
            key = stage.key(given, self.name)
            region = stage.regions.get(key)
            if region is None:
                declines.append((key, stage.declined[key]))
                continue
            heads = _checked(given, numbers, region)
            if heads:
                sites.append((key, heads))
        return _decision(self.name, sites, declines)


def _decision(name: str, sites: Iterable[tuple[str, tuple[int, ...]]], declines: Iterable[tuple[str, str]]) -> Decision:
    sites = tuple(sites)
    figures = {"heads removed": sum(len(heads) for _, heads in sites)}
    return Decision(name, sites, declines=tuple(declines), figures=figures)


def _checked(site: object, numbers: Any, region: Region) -> tuple[int, ...]:
    count = region.spec.heads.q
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Collection):
        raise OptionError(f"PruneHeads: the heads of {site!r} must be a sequence of numbers, not {numbers!r}.")
    for h in numbers:
        if isinstance(h, bool) or not isinstance(h, int) or not 0 <= h < count:
            raise OptionError(f"PruneHeads: {site!r} has no head {h!r}; its heads are 0 to {count - 1}.")
    heads = tuple(sorted(set(numbers)))
    if len(heads) == count:
        raise OptionError(f"PruneHeads: all {count} heads of {site!r} were named; at least one must stay.")
    return heads


def _least(scores: Mapping[str, Sequence[float]], fraction: float) -> dict[str, tuple[int, ...]]:
    """The least important heads over all sites, one at least left to each."""
    ranked = sorted((score, key, h) for key, found in scores.items() for h, score in enumerate(found))
    budget = int(fraction * len(ranked) + 1e-9)
    removed: dict[str, list[int]] = {}
    for _, key, h in ranked:
        if budget and len(removed.get(key, [])) < len(scores[key]) - 1:
            removed.setdefault(key, []).append(h)
            budget -= 1
    return {key: tuple(sorted(heads)) for key, heads in removed.items()}
