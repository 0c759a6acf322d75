"""Approximate rewrites of a whole graph: decide, apply, measure, and keep the result or refuse it.

A decision is remembered with the module, so that another capture of the same model (for training, or after the
module was loaded) is rewritten in the same way and takes the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from attnopt import dump
from attnopt.errors import CaptureError
from attnopt.passes.base import Approx
from attnopt.passes.stage import Stage, Tensors, copied
from attnopt.passes.tolerance import Calibration, Change, Tolerance

# Composition: first the rewrites that read and change projections, which the others hide from them; then those of
# scores; last those that replace what is computed of them. Of one kind, and others, in the order the user gives.
ORDER = ("prune_heads", "share_kv", "factor_bias", "sparsify", "linearize", "mix_heads")

_WHOLE = "the model's own attention"  # the site of a model that is one attention has no name


@dataclass(frozen=True)
class Decision:
    """What one rewrite does to one model: plain data.

    Attributes:
        rewrite: the rewrite's name.
        sites: site to what is done there (for `prune_heads` the heads that go).
        declines: site to the reason why it was left alone.
        cuts: parameters that became smaller: name, dimension, what stays of it, and the full shape.
        refused: what was measured, if the tolerance was exceeded; then nothing was changed.
        figures: what the rewrite says of itself, and what was measured before and after.
        remarks: site to what is worth knowing of it.
        working: what `decide` worked out for the first `apply`; not kept.
    """

    rewrite: str
    sites: tuple[tuple[str, tuple[int, ...]], ...] = ()
    declines: tuple[tuple[str, str], ...] = ()
    cuts: tuple[tuple[str, int, tuple[int, ...], tuple[int, ...]], ...] = ()
    refused: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[tuple[str, str], ...] = ()
    working: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def notes(self) -> tuple[str, ...]:
        """Sentences for the report."""
        if not (self.sites or self.declines or self.refused):
            return (f"{self.rewrite}: nothing was changed, because no site or head was chosen.",)
        lines = [f"{self.rewrite}: refused, because {self.refused}; the model is exact."] if self.refused else []
        lines += [f"{self.rewrite}: {site or _WHOLE} was left as it is, because {why}." for site, why in self.declines]
        return (*lines, *(f"{self.rewrite}: {site or _WHOLE}: {remark}." for site, remark in self.remarks))


class GraphRewrite(Protocol):
    """A rewrite that is decided over all sites of a model."""

    name: str
    contract: Approx
    loss: Any

    def decide(self, stage: Stage) -> Decision:
        """What to do. Changes nothing."""
        ...

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        """Do it to the stage. Returns why sites were left alone, by site."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The graph after the rewrites, the names and values of the tensors it takes, and what was decided."""

    gm: fx.GraphModule
    states: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    decisions: tuple[Decision, ...]


def rewrite(
    gm: fx.GraphModule, rewrites: Sequence[GraphRewrite], calibration: Calibration, tensors: Tensors,
    constants: Tensors, tolerance: Tolerance,
) -> Outcome:  # fmt: skip
    """Decide, apply and measure each rewrite; those outside the tolerance leave no trace but their decision."""
    original, first, measure = gm, dict(tensors), calibration
    decisions: list[Decision] = []
    for one in rewrites:
        stage = Stage(copied(gm), replace(measure, loss_of=one.loss), tensors, constants)
        decision = one.decide(stage)
        left = one.apply(stage, decision)
        stage.finish()
        dump.graph(one.name, stage.gm, {"_decision.txt": f"{decision}"})
        decision = replace(
            decision, sites=tuple(s for s in decision.sites if s[0] not in left),
            declines=(*decision.declines, *left.items()), cuts=tuple(stage.cuts), working={},
        )  # fmt: skip
        baseline = replace(calibration, loss_of=one.loss).baseline(original, first)
        change = stage.calibration.change(baseline, stage.gm, stage.tensors)
        refused = tolerance.exceeded(change) or ""
        figures = _figures(first, stage.tensors, change, decision)
        if refused:
            declines = tuple((site, refused) for site, _ in decision.sites)
            declines = (*decision.declines, *declines)
            decision = replace(decision, sites=(), cuts=(), declines=declines, refused=refused, remarks=())
        else:
            gm, tensors, measure = stage.gm, stage.tensors, stage.calibration
        decisions.append(replace(decision, figures=figures))
    return Outcome(gm, measure.states, tensors, tuple(decisions))


def repeat(
    gm: fx.GraphModule, rewrites: Sequence[GraphRewrite], decisions: Sequence[Decision], calibration: Calibration,
    tensors: Tensors, constants: Tensors,
) -> Outcome:  # fmt: skip
    """Another capture of a model that was rewritten before, rewritten in the same way.

    `tensors` are those that the rewrites made and the model holds: they are taken as they are, not made again.
    """
    for one, decision in zip(rewrites, decisions, strict=True):
        stage = Stage(copied(gm), calibration, {}, constants, tensors)
        left = one.apply(stage, decision)
        stage.finish()
        if left or sorted(c[:3] for c in stage.cuts) != sorted(c[:3] for c in decision.cuts):
            reasons = "; ".join(f"{site}: {why}" for site, why in left.items()) or "its projections differ"
            raise CaptureError(f"{one.name} was applied to this model, but does not fit its new capture: {reasons}.")
        gm, calibration = stage.gm, stage.calibration
    return Outcome(gm, calibration.states, tensors, tuple(decisions))


def _figures(before: Mapping[str, Any], after: Mapping[str, Any], change: Change, decision: Decision) -> dict[str, Any]:
    def count(tensors: Mapping[str, Any]) -> int:
        distinct = {id(t): t for t in tensors.values() if isinstance(t, torch.nn.Parameter)}
        return sum(math.prod(t.shape) for t in distinct.values())

    return {
        "sites": len(decision.sites),
        **decision.figures,
        "parameters before": count(before),
        "parameters after": count(after),
        "output change": change.output,
        "loss before": change.loss_before,
        "loss after": change.loss_after,
    }
