"""`Sparsify`: queries visit fewer keys, by position (a window with sinks) or by what the keys are (blocks)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.positions import WHOLE, each_head, last_key, windowed
from attnopt.errors import Decline, OptionError
from attnopt.passes.approximate import Decision, Stage
from attnopt.passes.base import APPROX, Approx, check_flag
from attnopt.passes.stage import Sites
from attnopt.passes.tolerance import Loss
from attnopt.patterns import projections
from attnopt.region import Region
from attnopt.select import Select
from attnopt.sparsify import cost
from attnopt.spec import AttentionSpec, Softmax

PerHead = int | float | Sequence[Any] | Mapping[int, Any]
_METHODS = {"window": {"window"}, "blocks": {"top", "mass", "block", "tile", "shared"}}


@dataclass(frozen=True)
class Sparsify:
    """Let each query visit only some of its keys; what it visits is dense attention under the narrower mask.

    `method="window"`: the last `window` keys of a causal site, or `window // 2` on either side, and the first `sinks`
    keys (StreamingLLM: Xiao et al., 2024). `method="blocks"`: per tile of queries the `top` blocks of keys, or those
    that reach `mass` of the estimated weights, by the products of mean queries and mean keys (MoBA: Lu et al., 2025;
    see `attnopt.select`); the tile's own block is always among them, and with `sinks` the first one.

    Attributes:
        method: `window` or `blocks`.
        window: keys of the window: a number, one for every head, or head to number; heads left out keep all keys.
        sinks: how many first keys are always kept; for blocks whether the first block is.
        top: blocks for each tile of queries, the own and the first among them: a number, or one a head.
        mass: instead of `top`, the share of the estimated weights to keep, in (0, 1): a number, or one a head.
        block, tile: keys of a block and queries of a tile, powers of two; `tile=1` chooses for every query.
        shared: the query heads of a key head choose together; then numbers a head are numbers a key head.
        length: decide for this number of tokens whether it pays; None means that of the example inputs.
        always: rewrite even where the estimate says that it does not pay.
        sites: module paths, patterns of them such as `layers.*.attn`, numbers in the report, or a function of module
            path and spec; None means all.
        loss: scalar loss of the model's output; None means its `.loss`, else the mean square of its first
            floating tensor.

    Raises:
        OptionError: for arguments that do not fit, and, once the model is known, for sites or heads that are not there.
    """

    method: str = "window"
    window: PerHead | None = None
    sinks: int = 4
    top: PerHead | None = None
    mass: PerHead | None = None
    block: int | None = None
    tile: int | None = None
    shared: bool | None = None
    length: int | None = None
    always: bool = False
    sites: Sites = None
    loss: Loss | None = None
    name: str = field(default="sparsify", init=False)
    contract: Approx = field(default=APPROX, init=False)
    requires: frozenset[str] = field(default=frozenset(), init=False)
    provides: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        check_flag("Sparsify", "always", self.always)
        if self.shared is not None:
            check_flag("Sparsify", "shared", self.shared)
        if self.method not in _METHODS:
            raise OptionError(f"Sparsify(method={self.method!r}) is unknown; choose one of {', '.join(_METHODS)}.")
        for method, names in _METHODS.items():
            given = sorted(n for n in names if getattr(self, n) is not None)
            if given and method != self.method:
                raise OptionError(f"Sparsify({', '.join(given)}) belongs to method={method!r}, not {self.method!r}.")
        if self.method == "window" and self.window is None:
            raise OptionError("Sparsify(method='window') needs window=256, one number a head, or {head: number}.")
        if self.method == "blocks" and (self.top is None) == (self.mass is None):
            raise OptionError("Sparsify(method='blocks') needs either top=8 (blocks) or mass=0.95.")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise OptionError(f"Sparsify(sinks={self.sinks!r}) must be a number of keys, 0 or more.")
        for name in ("window", "top", "mass"):
            for value in _each(getattr(self, name)):
                _checked(name, value)
        for name in ("block", "tile", "length"):
            size = getattr(self, name)
            whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
            if size is not None and (not whole or (name != "length" and size & (size - 1))):
                what = "a positive number" if name == "length" else "a power of two such as 64"
                raise OptionError(f"Sparsify({name}={size!r}) must be {what}.")

    def decide(self, stage: Stage) -> Decision:
        """Which sites become sparse. Changes nothing."""
        sites, declines = [], []
        for key in stage.choose(self.sites, self.name):
            region = stage.regions.get(key)
            spec = Decline(stage.declined[key]) if region is None else self.sparse(region)
            if isinstance(spec, Decline) or region is None:
                declines.append((key, str(spec)))
            else:
                sites.append((key, region, spec))
        if self.always or not sites:
            return Decision(self.name, tuple((key, ()) for key, _, _ in sites), declines=tuple(declines))
        kept = []
        shares = cost.measured(stage, {key: spec for key, _, spec in sites}) if self.mass is not None else {}
        for key, region, spec in sites:
            reason = cost.too_dear(region, spec, self.length, shares.get(key))
            declines.append((key, reason)) if reason else kept.append(key)
        return Decision(self.name, tuple((key, ()) for key in kept), declines=tuple(declines))

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        """Narrow the decided sites. Returns why sites were left, by site."""
        left = {}
        for key, _ in decision.sites:
            region = stage.regions.get(key)
            spec = Decline("the site is not recognised") if region is None else self.sparse(region)
            if region is not None and not isinstance(spec, Decline):
                spec = stage.put(key, region.replace(spec=spec), self.name) or spec
            if isinstance(spec, Decline):
                left[key] = str(spec)
        return left

    def sparse(self, region: Region) -> AttentionSpec | Decline:
        """The spec of a site with fewer keys, or why it has none."""
        spec, own = region.spec, last_key(region.spec.keep)
        if region.merge:
            return Decline("it adds up several attentions", region.anchor)
        if not isinstance(spec.normalizer, Softmax):
            return Decline("it is no softmax: keys left out would change its sums without a measure", region.anchor)
        if own is None and (reason := _apart(region)):
            return Decline(reason, region.anchor)
        causal, own = own is not None, ex.q if own is None else own
        if self.method == "window":
            numbers = _numbers("window", self.window, spec.heads.q, WHOLE)
            kept = windowed(own, each_head([int(n) for n in numbers]), self.sinks, causal)
            return replace(spec, keep=sp.And(spec.keep, kept)).canonical()
        if spec.select is not None:
            return Decline("its keys are selected already", region.anchor)
        return self._selected(spec, own, region)

    def _selected(self, spec: AttentionSpec, own: sp.Expr, region: Region) -> AttentionSpec | Decline:
        scale = _scale(spec.score)
        if scale is None:
            if self.mass is not None:
                return Decline(f"its score is no multiple of {ex.s} near zero, so masses are unknown", region.anchor)
            scale = sp.S.One
        heads = spec.heads.k if self.shared else spec.heads.q
        rule = "topk" if self.mass is None else "mass"
        given = self.top if self.mass is None else self.mass
        numbers = _numbers("top" if self.mass is None else "mass", given, heads, None)
        amount = tuple(sp.Rational(Fraction(str(x)).numerator, Fraction(str(x)).denominator) for x in numbers)
        amount = amount[:1] if len(set(amount)) == 1 else amount
        select = Select(
            rule, amount, self.block or 64, self.tile or 64, own, int(self.sinks > 0), scale, bool(self.shared)
        )
        return replace(spec, select=select).canonical()


def _each(given: Any) -> Sequence[Any]:
    if given is None or isinstance(given, (str, bytes)) or not isinstance(given, (Sequence, Mapping)):
        return () if given is None else (given,)
    return tuple(given.values()) if isinstance(given, Mapping) else tuple(given)


def _checked(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and (0 < value < 1 if name == "mass" else isinstance(value, int) and 0 < value < WHOLE)
    if not fits and not (name == "window" and value is None):
        what = "between 0 and 1" if name == "mass" else "a positive whole number"
        raise OptionError(f"Sparsify({name}={value!r}) must be {what}, for every head that is named.")


def _numbers(name: str, given: Any, heads: int, rest: int | None) -> list[Any]:
    """One number for each head; `rest` where none is given."""
    if isinstance(given, Mapping):
        wrong = [x for x in given if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < heads]
        if wrong or (rest is None and len(given) < heads):
            raise OptionError(
                f"Sparsify({name}={dict(given)!r}): the site has heads 0 to {heads - 1}, no more, no less."
            )
        return [rest if given.get(i) is None else given[i] for i in range(heads)]
    if isinstance(given, Sequence):
        if len(given) != heads:
            raise OptionError(f"Sparsify({name}=...) has {len(given)} numbers, and the site has {heads} heads.")
        return [rest if x is None else x for x in given]
    return [given] * heads


def _apart(region: Region) -> str | None:
    """Why positions of queries say nothing of positions of keys where the mask does not tell; None if they do."""
    n_q, n_k = (cost.extent(o, d) for o, d in ((region.query, "q"), (region.key, "k")))
    if n_q != n_k:
        return f"it is no self-attention: {n_q} queries, {n_k} keys, and no causal mask to say where they stand"
    found = projections.find(region)
    if not isinstance(found, Decline) and found.q.input is not found.k.input:
        return "it is cross-attention: the positions of its queries are not those of its keys"
    return None


def _scale(score: sp.Expr) -> sp.Rational | None:
    """The slope of the score at s = 0: that of the products in the estimate."""
    slope = sp.diff(score, ex.s).subs(ex.s, 0)
    return slope if slope.is_Rational else None
