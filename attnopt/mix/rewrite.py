"""`MixHeads`: each token uses the heads that matter to it, and a kernel that computes no others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor, fx, nn

from attnopt import expr as ex
from attnopt.errors import Decline, OptionError
from attnopt.mix import cost
from attnopt.mix.measure import Measured, fitted, measure
from attnopt.mix.routers import Router
from attnopt.mix.tokens import Tokens, tokens
from attnopt.passes.approximate import Decision
from attnopt.passes.base import APPROX, Approx, check_flag
from attnopt.passes.stage import Sites, Stage
from attnopt.passes.tolerance import Loss
from attnopt.patterns import projections
from attnopt.patterns.projections import Projections
from attnopt.region import Operand, Region
from attnopt.spec import Capture, Softmax

ROUTERS = ("norm", "linear")
_ROUTE = "route"


@dataclass(frozen=True)
class MixHeads:
    """Turn the heads of an attention into a mixture, after MoH (Jin et al., 2024): shared heads and routed ones.

    A token uses all shared heads and the `active` routed heads that its router ranks highest. A head that is off gives
    its mean output on the calibration inputs. Kernels gather the tokens of each head in order of position and compute
    nothing else; masks see true positions, keys and values stay whole.

    Attributes:
        shared: heads that are always on: those that would be missed most on the calibration inputs.
        active: routed heads that are on for a token.
        router: `norm` ranks by the norm of a head's query times a fixed number a head; `linear` by a linear map of the
            token, fitted to what each head would be missed for, a parameter of the result.
        sites: module paths, patterns of them, numbers in the report, or a function of path and spec; None means all.
        always: rewrite sites even where the estimate says that skipping heads does not pay.
        loss: scalar loss of the model's output, as for `PruneHeads`.

    Raises:
        OptionError: for arguments that do not fit, and, once the model is known, for sites that are not there.
    """

    shared: int = 2
    active: int = 4
    router: str = "norm"
    sites: Sites = None
    always: bool = False
    loss: Loss | None = None
    name: str = field(default="mix_heads", init=False)
    contract: Approx = field(default=APPROX, init=False)
    requires: frozenset[str] = field(default=frozenset(), init=False)
    provides: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        check_flag("MixHeads", "always", self.always)
        if self.router not in ROUTERS:
            raise OptionError(f"MixHeads(router={self.router!r}) is unknown; choose one of {', '.join(ROUTERS)}.")
        for name, least in (("shared", 0), ("active", 1)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < least:
                raise OptionError(f"MixHeads({name}={given!r}) must be a whole number of at least {least}.")

    def decide(self, stage: Stage) -> Decision:
        """For each site the numbers of its shared heads."""
        keys = stage.choose(self.sites, self.name)
        declines = [(key, stage.declined[key]) for key in keys if key in stage.declined]
        fitting: dict[str, _Fit] = {}
        for key in (key for key in keys if key in stage.regions):
            found = self._fit(stage, stage.regions[key])
            if isinstance(found, str):
                declines.append((key, found))
            else:
                fitting[key] = found
        if fitting and not stage.calibration.given:
            raise OptionError(
                "MixHeads takes the mean of every head and what it would be missed for from calibration inputs, and "
                "saw none: pass calibration=[...] to optimize."
            )
        sites = []
        for key, seen in measure(stage, {key: None for key in fitting}).items():
            made = self._shared(stage, fitting[key], stage.regions[key], seen)
            (declines if isinstance(made, str) else sites).append((key, made))  # type: ignore[arg-type]
        return Decision(self.name, tuple(sites), declines=tuple(declines))

    def _fit(self, stage: Stage, region: Region) -> _Fit | str:
        """The projections of a site that can be mixed, or why it cannot."""
        spec, on = region.spec, self.shared + self.active
        if spec.select is not None:
            return "its keys are selected already, for all heads' rows"
        if region.merge or not isinstance(spec.normalizer, Softmax):
            return "its heads are no plain softmax attention each"
        if spec.rows != sp.true:
            return "its heads are a mixture already"
        if on >= spec.heads.q:
            what = "all of them would be on" if on == spec.heads.q else f"{on} cannot be on"
            return f"it has {spec.heads.q} heads, and {what}"
        made = projections.find(region)
        if isinstance(made, Decline):
            return str(made)
        shared = stage.shared(p for p in (made.o.weight, made.q.weight) if p)
        if shared:
            return f"parameter {shared} is used under several names"
        read = tokens(region, made.q) if self.router == "linear" else None
        return str(read) if isinstance(read, Decline) else _Fit(made, read)

    def _shared(self, stage: Stage, fit: _Fit, region: Region, seen: Measured) -> tuple[int, ...] | str:
        """The heads that would be missed most; or the estimate, if mixing does not pay."""
        if not seen.outputs:
            return "the calibration inputs do not reach it"
        width = fit.tokens.width if fit.tokens else region.spec.heads.d_qk
        guess = cost.estimate(region.spec, seen.query, seen.keys, self.shared + self.active, width)
        if not self.always and not guess.pays:
            return str(guess)
        missed = seen.missed(_columns(stage, fit.made)).square().mean(0)
        return tuple(sorted(missed.argsort(descending=True, stable=True)[: self.shared].tolist()))

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        """Give the decided sites a router. Returns why sites were left, by site."""
        left: dict[str, str] = {}
        fits: dict[str, _Fit] = {}
        for key, _ in decision.sites:
            region = stage.regions.get(key)
            found = "the site is not recognised" if region is None else self._fit(stage, region)
            if isinstance(found, str):
                left[key] = found
            else:
                fits[key] = found
        seen = measure(stage, {key: fit.tokens for key, fit in fits.items()}) if stage.tensors else {}
        for key, shared in decision.sites:
            if key in fits:
                problem = self._put(stage, key, shared, fits[key], seen.get(key))
                if problem:
                    left[key] = problem
        return left

    def _put(self, stage: Stage, key: str, shared: tuple[int, ...], fit: _Fit, seen: Measured | None) -> str | None:
        values = _Values(seen, shared, _columns(stage, fit.made) if seen else [])
        region = stage.plain(key)
        if isinstance(region, Decline):
            return str(region)
        query = region.query.node
        values.query = query
        router = Router(stage, region.anchor, query)
        held = {name: stage.add(key, name, getattr(values, name)) for name in self._names()}
        if fit.tokens is None:
            scores = router.norms(held["scale"])
        else:
            scores = router.linear(fit.tokens, held["weight"], held["bias"])
        gate = router.gate(scores, held["shared"], self.active, fit.tokens is not None)
        load = ex.load(_ROUTE, ex.b, ex.h, ex.q)
        capture = Capture(_ROUTE, "float", (None, region.spec.heads.q, None))
        spec = replace(
            region.spec, gate=region.spec.gate * load, rows=sp.Ne(load, 0), captures=(*region.spec.captures, capture)
        ).canonical()
        captures = {**region.captures, _ROUTE: Operand(gate, ("i0", "i1", "i2"))}
        problem = stage.put(key, region.replace(spec=spec, captures=captures), self.name)
        if problem is not None:
            return str(problem)
        out = stage.regions[key].output
        users = list(out.users)
        total = Router(stage, out.next, query).with_means(out, gate, held["mean"])
        for user in users:
            user.replace_input_with(out, total)
        return None

    def _names(self) -> tuple[str, ...]:
        return ("shared", "mean", *(("scale",) if self.router == "norm" else ("weight", "bias")))


@dataclass(frozen=True)
class _Fit:
    """The projections around a site, and what a linear router reads."""

    made: Projections
    tokens: Tokens | None


def _columns(stage: Stage, made: Projections) -> list[Tensor]:
    """The output projection's columns of each head, `[out, d_v]`."""
    weight = stage.tensors[stage.states[made.o.weight]].detach()
    weight = weight.t() if made.o.transposed else weight
    return [weight[:, list(rows)] for rows in made.o.rows]


class _Values:
    """The tensors that a site brings along, made of what was measured."""

    def __init__(self, seen: Measured | None, shared: tuple[int, ...], columns: list[Tensor]) -> None:
        self.seen, self.heads, self.columns = seen, shared, columns
        self.query: fx.Node | None = None
        self.router: tuple[Tensor, Tensor] | None = None

    def _kept(self, tensor: Tensor) -> Tensor:
        like: Any = self.query.meta["val"] if self.query is not None else tensor
        return tensor.to(like.dtype).contiguous()

    def shared(self) -> Tensor:
        """`[H, 1]`, 1 for heads that are always on."""
        marks = torch.zeros(len(self.columns), 1)
        marks[list(self.heads)] = 1.0
        return self._kept(marks.to(self.columns[0].device))

    def mean(self) -> Tensor:
        """`[H, 1, d_v]`."""
        assert self.seen is not None
        return self._kept(self.seen.mean()[:, None])

    def scale(self) -> Tensor:
        """`[H, 1]`: what a head would be missed for, for each unit of its queries' norm."""
        assert self.seen is not None
        norms = torch.cat(self.seen.norms).mean(0)
        missed = self.seen.missed(self.columns).mean(0)
        return self._kept((missed / norms.clamp_min(torch.finfo(torch.float64).tiny))[:, None])

    def _fitted(self) -> tuple[Tensor, Tensor]:
        assert self.seen is not None
        if self.router is None:
            self.router = fitted(torch.cat(self.seen.tokens), self.seen.missed(self.columns))
        return self.router

    def weight(self) -> Tensor:
        """`[H, width]`."""
        return nn.Parameter(self._kept(self._fitted()[0]))

    def bias(self) -> Tensor:
        """`[H]`."""
        return nn.Parameter(self._kept(self._fitted()[1]))
