"""`Linearize`: softmax attention becomes linear attention over features of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sympy as sp
from torch import fx, nn

from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form, multiplications
from attnopt.errors import Decline, OptionError
from attnopt.graph import value
from attnopt.linearize.features import MAPS, aten
from attnopt.linearize.fit import Fit, Recipe, collect, fit_all, near_keys
from attnopt.passes.approximate import Decision
from attnopt.passes.base import APPROX, Approx, check_flag
from attnopt.passes.stage import Sites, Stage
from attnopt.passes.tolerance import Loss
from attnopt.readable import show
from attnopt.region import Operand, Region
from attnopt.spec import AttentionSpec, EmptyRow, Mixed, Pointwise, Softmax

# A row whose features are all zero is divided by this, and is zero.
_LEAST = sp.Rational(1, 10**6)
_DIMS = ("b", "h", "q", "d"), ("b", "h", "k", "d")


@dataclass(frozen=True)
class Linearize:
    """Replace `softmax(s)` by `phi(q) . phi(k)`, divided by its row sum: cost grows with the length, not its square.

    Causal sites stay causal, masks of keys alone (padding) stay; grouped heads stay grouped. Sites with another
    mask, a bias or a soft-cap are declined.

    Attributes:
        feature: the map `phi`: `elu` (elu(x) + 1), `relu`, or `hedgehog` ([exp(xW), exp(-xW)], a matrix a head for
            queries and one for keys, fitted to the site's own attention on the calibration inputs).
        features: columns of the learned matrices; None means the width of a head.
        window: causal sites keep the softmax for the last so many keys of each query, in one sum with the linear rest;
            None for no such window.
        length: decide for this number of tokens whether it pays; None means that of the example inputs.
        steps: Adam steps of the fit. seed: of the rows that it draws. progress: show a bar on a terminal.
        sites: which sites: module paths, patterns of them such as `layers.*.attn`, numbers in the report, or a function
            of module path and spec; None means all.
        loss: scalar loss of the model's output; None means its `.loss`, else the mean square of its first
            floating tensor.

    Raises:
        OptionError: for arguments that do not fit, and, once the model is known, for sites that are not there.
    """

    feature: str = "hedgehog"
    features: int | None = None
    window: int | None = None
    length: int | None = None
    steps: int = 300
    seed: int = 0
    progress: bool = True
    sites: Sites = None
    loss: Loss | None = None
    name: str = field(default="linearize", init=False)
    contract: Approx = field(default=APPROX, init=False)
    requires: frozenset[str] = field(default=frozenset(), init=False)
    provides: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        check_flag("Linearize", "progress", self.progress)
        if self.feature not in MAPS:
            raise OptionError(f"Linearize(feature={self.feature!r}) is unknown; choose one of {', '.join(MAPS)}.")
        for name, least in (("features", 1), ("window", 1), ("length", 1), ("steps", 1), ("seed", 0)):
            given = getattr(self, name)
            optional = given is None and name in ("features", "window", "length")
            if not optional and (isinstance(given, bool) or not isinstance(given, int) or given < least):
                raise OptionError(f"Linearize({name}={given!r}) must be a whole number of at least {least}.")
        if self.features is not None and not MAPS[self.feature].learned:
            raise OptionError(f"Linearize(features=...) belongs to learned maps; {self.feature} has none.")

    def decide(self, stage: Stage) -> Decision:
        """Which sites are replaced. Changes nothing."""
        keys = stage.choose(self.sites, self.name)
        sites, declines = [], []
        for key in keys:
            region = stage.regions.get(key)
            reason = stage.declined[key] if region is None else self.obstacle(region)
            if reason:
                declines.append((key, reason))
            else:
                sites.append((key, ()))
        if sites and MAPS[self.feature].learned and not stage.calibration.given:
            raise OptionError(
                f"Linearize({self.feature!r}) is fitted to calibration inputs and saw none: pass calibration=[...] to "
                "optimize, or take feature='elu'."
            )
        return Decision(self.name, tuple(sites), declines=tuple(declines))

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        """Replace the decided sites. Returns why sites were left, by site."""
        left, fits = {}, _Fits(self, stage, [key for key, _ in decision.sites])
        missing = [key for key, _ in decision.sites if key not in stage.regions]
        left.update(dict.fromkeys(missing, "the site is not recognised"))
        sites = [key for key, _ in decision.sites if key not in left]
        # All that is learned comes first: it is fitted to what the unchanged graph gives every site.
        learned = {key: fits.nodes(key) for key in sites}
        for key in sites:
            found = stage.put(key, stage.regions[key]) or self._put(stage, key, learned[key])
            if found is not None:
                left[key] = str(found)
        return left

    def _put(self, stage: Stage, key: str, learned: Sequence[fx.Node | None]) -> Decline | None:
        region, make = stage.regions[key], MAPS[self.feature].make

        def call(target: Any, *args: Any) -> fx.Node:
            return stage.emit(region.anchor, target, *args)

        given = region.query.node, region.key.node
        query, keys = (make(call, x, w) for x, w in zip(given, learned, strict=False))
        spec = linearized(region.spec, int(value(query).shape[3]), MAPS[self.feature].positive, self.window)
        if isinstance(spec, Decline):
            return spec
        if self.window is not None:
            if learned[2] is not None:
                query = call(aten.mul.Tensor, query, call(aten.exp.default, learned[2]))
            query, keys = (call(aten.cat.default, pair, -1) for pair in ([given[0], query], [given[1], keys]))
        operands = {"query": Operand(query, _DIMS[0]), "key": Operand(keys, _DIMS[1])}
        return stage.put(key, region.replace(spec=spec, **operands), self.name)

    def obstacle(self, region: Region) -> str | None:
        """Why a site is left as it is; None if it is replaced."""
        if region.merge:
            return "it adds up several attentions"
        width = MAPS[self.feature].width(region.spec.heads.d_qk, self.features or region.spec.heads.d_qk)
        spec = linearized(region.spec, width, MAPS[self.feature].positive, self.window)
        if isinstance(spec, Decline):
            return str(spec)
        plain = linearized(region.spec, width, True)
        assert isinstance(plain, AttentionSpec)
        causal = self.window is not None or linear_form(plain).causal  # type: ignore[union-attr]
        n_q, n_k = (_extent(o, d) for o, d in ((region.query, "q"), (region.key, "k")))
        if self.length is not None:
            n_q, n_k = (self.length if n_q > 1 else 1), self.length
        heads = region.spec.heads
        softmax = n_q * n_k * (heads.d_qk + heads.d_v) // (2 if causal else 1)
        linear = multiplications(plain, n_q, n_k, causal)[1]
        if MAPS[self.feature].learned:
            linear += (n_q + n_k) * heads.d_qk * width // 2
        linear += n_q * (self.window or 0) * (heads.d_qk + heads.d_v)
        if linear <= softmax:
            return None
        return (
            f"it would not pay: {linear / 1e6:.3g} million multiplications a head instead of {softmax / 1e6:.3g} at "
            f"{n_q} queries and {n_k} keys; give length= to decide for longer inputs"
        )


def linearized(spec: AttentionSpec, width: int, positive: bool, window: int | None = None) -> AttentionSpec | Decline:
    """The linear attention over features of this width that stands for a softmax attention, with its mask.

    With a window, queries and keys come with their features behind them. A row without keys is NaN where it was and
    where only such rows sum to zero (`positive`); else it is zeros.
    """
    factor = sp.cancel(spec.score / ex.s)
    if not isinstance(spec.normalizer, Softmax):
        return Decline("it is no softmax")
    if spec.normalizer.sink is not None:
        return Decline("it has a sink, whose share no feature map has")
    if not factor.is_number or not factor.is_positive:
        return Decline(f"its score {ex.s} is changed by more than a scale: {show(spec.score)}")
    if spec.weight != 1 or spec.returns:
        return Decline("its weights are used or changed after the softmax")
    divide = ex.t if positive and spec.empty_row is EmptyRow.NAN else ex.Maximum(ex.t, _LEAST)
    # Weights that are never made cannot be dropped.
    made = replace(
        spec, heads=replace(spec.heads, d_qk=width), score=ex.s, dropout=0.0, empty_row=EmptyRow.ZERO,
        normalizer=Pointwise(divide),
    ).canonical()  # fmt: skip
    if linear_form(made) is None:
        return Decline(f"its mask is neither causal nor of the keys alone: {show(spec.keep)}")
    near = None if window is None else near_keys(spec.keep, window)
    if window is None:
        return made
    if near is None:
        return Decline("a softmax window needs a causal mask, and this site has none")
    heads = replace(spec.heads, d_qk=spec.heads.d_qk + width)
    return replace(made, heads=heads, score=spec.score, normalizer=Mixed(near, width)).canonical()


class _Fits:
    """The learned tensors of all sites: fitted together when the first of them is asked for."""

    def __init__(self, options: Linearize, stage: Stage, keys: Sequence[str]) -> None:
        self.options, self.stage, self.keys = options, stage, keys
        self.found: dict[str, Fit] = {}

    def nodes(self, key: str) -> list[fx.Node | None]:
        """Placeholders of the site's weights for queries, for keys, and of the balance; None where there is none."""
        if not MAPS[self.options.feature].learned:
            return [None, None, None]
        names = {"query_map": "query", "key_map": "key", "balance": "balance"}
        if self.options.window is None:
            del names["balance"]
        return [self.stage.add(key, name, partial(self._made, key, part)) for name, part in names.items()]

    def _made(self, key: str, which: str) -> nn.Parameter:
        if not self.found:
            one = self.options
            recipe = Recipe(MAPS[one.feature], one.features, one.steps, one.seed, one.progress, one.window)
            self.found = fit_all(collect(self.stage, self.keys), recipe)
        region = self.stage.regions[key]
        like = value((region.key if which == "key" else region.query).node)
        return nn.Parameter(getattr(self.found[key], which).to(device=like.device, dtype=like.dtype))


def _extent(operand: Operand, name: str) -> int:
    """A size of an operand; for a size known only at run time that of the example."""
    if name not in operand.dims:
        return 1
    size = value(operand.node).shape[operand.dims.index(name)]
    return size if isinstance(size, int) else int(size.node.hint or 1)
