"""Approximate rewrites of a whole graph: decide, apply, measure, and keep the result or refuse it.

A decision is remembered with the module, so that another capture of the same model (for training, or after the
module was loaded) is rewritten in the same way and takes the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from attnopt import dump, patterns
from attnopt.errors import CaptureError, OptionError
from attnopt.graph import module_path
from attnopt.passes.base import Approx
from attnopt.passes.tolerance import Calibration, Change, Tolerance
from attnopt.region import Region

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Decision:
    """What one rewrite does to one model: plain data.

    Attributes:
        rewrite: the rewrite's name.
        sites: site to what is done there (for `prune_heads` the heads that go).
        declines: site to the reason why it was left alone.
        cuts: parameters that became smaller: name, dimension, what stays of it, and the full shape.
        refused: what was measured, if the tolerance was exceeded; then nothing was changed.
        figures: measured before and after.
    """

    rewrite: str
    sites: tuple[tuple[str, tuple[int, ...]], ...] = ()
    declines: tuple[tuple[str, str], ...] = ()
    cuts: tuple[tuple[str, int, tuple[int, ...], tuple[int, ...]], ...] = ()
    refused: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """Sentences for the report."""
        lines = [f"{self.rewrite}: refused, because {self.refused}; the model is exact."] if self.refused else []
        return (*lines, *(f"{self.rewrite}: {site} was left as it is, because {why}." for site, why in self.declines))


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


class Stage:
    """A graph under rewriting: its sites by key, and the tensors it takes.

    A site's key is its module path, with `#1`, `#2`... for further sites of the same module.

    Attributes:
        gm: the graph; rewrites change it in place.
        tensors: state name to tensor; rewrites replace entries.
        regions: site key to region. declined: site key to the reason. paths: all keys in graph order.
        cuts: parameters that became smaller so far.
    """

    def __init__(self, gm: fx.GraphModule, calibration: Calibration, tensors: Tensors, constants: Tensors) -> None:
        self.gm = gm
        self.calibration = calibration
        self.tensors = dict(tensors)
        self.cuts: list[tuple[str, int, tuple[int, ...], tuple[int, ...]]] = []
        self.regions: dict[str, Region] = {}
        self.declined: dict[str, str] = {}
        self.paths: list[str] = []
        for anchor, _, result in patterns.find(gm.graph, constants):
            path = module_path(anchor)
            count = sum(p == path or p.startswith(f"{path}#") for p in self.paths)
            key = f"{path}#{count}" if count else path
            self.paths.append(key)
            if isinstance(result, Region):
                self.regions[key] = result
            else:
                self.declined[key] = str(result)
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self._names = dict(zip(inputs, calibration.states, strict=False))

    def key(self, given: str | int, rewrite: str) -> str:
        """The key of a site that the user named. Raises `OptionError` with what there is."""
        if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(self.paths):
            return self.paths[given]
        if given in self.paths:
            return str(given)
        known = ", ".join(self.paths[:12]) + (", ..." if len(self.paths) > 12 else "")
        raise OptionError(f"{rewrite}: there is no attention site {given!r}; the {len(self.paths)} sites are {known}.")

    def cut(self, placeholder: fx.Node, dim: int, keep: tuple[int, ...]) -> None:
        """Keep only part of the parameter that a placeholder takes."""
        name = self._names[placeholder]
        old = self.tensors.get(name)
        self.cuts.append((name, dim, keep, tuple(old.shape) if old is not None else ()))
        if old is None or old.shape[dim] == len(keep):
            return
        index = torch.tensor(keep, device=old.device)
        self.tensors[name] = torch.nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad)

    def shared(self, placeholders: Iterable[fx.Node]) -> str | None:
        """The name of a parameter among these that is held under another name too, or is no parameter."""
        for node in placeholders if self.tensors else ():
            name = self._names.get(node)
            held = self.tensors.get(name or "")
            names = [n for n, tensor in self.tensors.items() if tensor is held]
            if name is None or not isinstance(held, torch.nn.Parameter) or len(names) > 1:
                return name or str(node)
        return None


@dataclass(frozen=True)
class Outcome:
    """The graph after the rewrites, the tensors that replace parameters, and what was decided."""

    gm: fx.GraphModule
    tensors: Mapping[str, torch.Tensor]
    decisions: tuple[Decision, ...]


def rewrite(
    gm: fx.GraphModule, rewrites: Sequence[GraphRewrite], calibration: Calibration, tensors: Tensors,
    constants: Tensors, tolerance: Tolerance,
) -> Outcome:  # fmt: skip
    """Decide, apply and measure each rewrite; those outside the tolerance leave no trace but their decision."""
    original, first = gm, dict(tensors)
    decisions: list[Decision] = []
    for one in rewrites:
        measured = replace(calibration, loss_of=one.loss)
        stage = Stage(_copy(gm), measured, tensors, constants)
        decision = one.decide(stage)
        left = one.apply(stage, decision)
        dump.graph(one.name, stage.gm, {"_decision.txt": f"{decision}"})
        decision = replace(
            decision, sites=tuple(s for s in decision.sites if s[0] not in left),
            declines=(*decision.declines, *left.items()), cuts=tuple(stage.cuts),
        )  # fmt: skip
        change = measured.change(measured.baseline(original, first), stage.gm, stage.tensors)
        refused = tolerance.exceeded(change) or ""
        figures = _figures(first, stage.tensors, change, decision)
        if refused:
            declines = tuple((site, refused) for site, _ in decision.sites)
            decision = replace(decision, sites=(), cuts=(), declines=(*decision.declines, *declines), refused=refused)
        else:
            gm, tensors = stage.gm, stage.tensors
        decisions.append(replace(decision, figures=figures))
    return Outcome(gm, tensors, tuple(decisions))


def repeat(
    gm: fx.GraphModule, rewrites: Sequence[GraphRewrite], decisions: Sequence[Decision], calibration: Calibration,
    constants: Tensors,
) -> fx.GraphModule:  # fmt: skip
    """Another capture of a model that was rewritten before, rewritten in the same way. Its tensors are there."""
    for one, decision in zip(rewrites, decisions, strict=True):
        stage = Stage(_copy(gm), calibration, {}, constants)
        left = one.apply(stage, decision)
        if left or sorted(c[:3] for c in stage.cuts) != sorted(c[:3] for c in decision.cuts):
            reasons = "; ".join(f"{site}: {why}" for site, why in left.items()) or "its projections differ"
            raise CaptureError(f"{one.name} was applied to this model, but does not fit its new capture: {reasons}.")
        gm = stage.gm
    return gm


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, fresh)


def _figures(before: Mapping[str, Any], after: Mapping[str, Any], change: Change, decision: Decision) -> dict[str, Any]:
    def count(tensors: Mapping[str, Any]) -> int:
        distinct = {id(t): t for t in tensors.values() if isinstance(t, torch.nn.Parameter)}
        return sum(math.prod(t.shape) for t in distinct.values())

    return {
        "sites": len(decision.sites),
        "heads removed": sum(len(heads) for _, heads in decision.sites),
        "parameters before": count(before),
        "parameters after": count(after),
        "output change": change.output,
        "loss before": change.loss_before,
        "loss after": change.loss_after,
    }
