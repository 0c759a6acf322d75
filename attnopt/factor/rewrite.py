"""`FactorBias`: what is added to the scores becomes further dimensions of query and key, or one value a distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sympy as sp
import torch
from torch import Tensor, fx, nn

from attnopt import expr as ex
from attnopt.analysis import separable
from attnopt.analysis.separable import Split
from attnopt.errors import Decline, OptionError
from attnopt.factor import cost
from attnopt.factor.columns import Columns
from attnopt.factor.low_rank import Factors, line_of
from attnopt.graph import value
from attnopt.passes.approximate import Decision
from attnopt.passes.base import APPROX, Approx
from attnopt.passes.stage import Seen, Sites, Stage
from attnopt.passes.tolerance import Loss
from attnopt.region import Line, Operand, Region
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.spec import AttentionSpec, Capture, Softmax

_LINE = -1


@dataclass(frozen=True)
class FactorBias:
    """Factor biases of the scores, after FlashBias (Wu et al., NeurIPS 2025).

    With `bias(q, k) = sum_r phi_r(q) psi_r(k)` the scores are `[q, phi/scale] . [k, psi] * scale`, an attention with
    wider heads and no bias. Closed forms (ALiBi, products, polynomials of the distance) are factored exactly. A
    learned table `[heads, n_q, n_k]` (Swin, BEiT) is factored by its singular values, `phi` and `psi` are parameters
    of the result; a table of the distance alone becomes a line of `n_q + n_k - 1` values, bit by bit the same.

    Attributes:
        rank: how many dimensions a table gets; or
        tolerance: the largest relative error of a head's table (Frobenius norm, without what cancels in a softmax),
            which decides the rank. Without either, 0.01.
        sites: which sites to consider: module paths, patterns of them such as `layers.*.attn`, numbers in the report,
            or a function of module path and spec; None means all.
        when: `pays` leaves a site alone where the estimate says that its bias costs less than its factors would;
            `always` factors whatever can be, for the memory.
        loss: scalar loss of the model's output, as for `PruneHeads`.

    Raises:
        OptionError: for arguments that do not fit, and, once the model is known, for sites that are not there.
    """

    rank: int | None = None
    tolerance: float | None = None
    sites: Sites = None
    when: str = "pays"
    loss: Loss | None = None
    name: str = field(default="factor_bias", init=False)
    contract: Approx = field(default=APPROX, init=False)
    requires: frozenset[str] = field(default=frozenset(), init=False)
    provides: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        if self.rank is not None and self.tolerance is not None:
            raise OptionError("FactorBias takes rank= or tolerance=, not both: one of them decides the other.")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise OptionError(f"FactorBias(rank={self.rank!r}) must be a positive whole number.")
        if self.tolerance is not None:
            number = isinstance(self.tolerance, (int, float)) and not isinstance(self.tolerance, bool)
            if not number or not 0 <= self.tolerance < 1:
                raise OptionError(f"FactorBias(tolerance={self.tolerance!r}) must be a number from 0 to below 1.")
        if self.when not in ("pays", "always"):
            raise OptionError(f"FactorBias(when={self.when!r}) is unknown; choose pays or always.")

    def decide(self, stage: Stage) -> Decision:
        """For each site whether closed forms are factored, and the rank of its table (-1: a line, 0: none)."""
        allowed = stage.choose(self.sites, self.name)
        seen, sites = _first(stage), []
        declines = [(key, stage.declined[key]) for key in allowed if key in stage.declined]
        for key in (key for key in allowed if key in stage.regions):
            found = self._site(stage, stage.regions[key], seen.get(key))
            if isinstance(found, str):
                declines.append((key, found))
            else:
                sites.append((key, found))
        return Decision(self.name, tuple(sites), declines=tuple(declines))

    def _site(self, stage: Stage, region: Region, seen: Seen | None) -> tuple[int, int] | str:
        parts = _split(stage, region)
        if isinstance(parts, str):
            return parts
        if seen is None:
            return "the calibration inputs do not reach it"
        reasons = []
        exact = _closed(parts, seen, self.when)
        if isinstance(exact, str):
            reasons.append(exact)
        rank = self._table(parts, region, seen)
        if isinstance(rank, str):
            reasons.append(rank)
        made = (int(exact is True), rank if isinstance(rank, int) else 0)
        return made if any(made) else "; ".join(reasons) or "nothing that can be factored is added to its scores"

    def _table(self, parts: Split, region: Region, seen: Seen) -> int | str:
        """The rank of the site's table, `_LINE`, or why it stays."""
        if parts.table == 0:
            return 0
        ends = (region.query, "q"), (region.key, "k")
        if not all(isinstance(value(o.node).shape[o.dims.index(place)], int) for o, place in ends):
            return "the size of its table is known only at run time"
        table = _values(parts.table, seen)
        if not bool(table.isfinite().all()):
            return "its table holds infinite values, which are a mask"
        if line_of(table) is not None:
            return _LINE
        factors = Factors(table, seen.spec.heads.k_map, _centred(seen.spec))
        if factors.size == 0:
            return "its table adds nothing that a softmax sees"
        rank = self.rank or factors.rank(0.01 if self.tolerance is None else self.tolerance)
        guess = cost.estimate(seen.q, seen.k, rank, True, 1)
        if self.when == "pays" and not guess.pays:
            return f"{guess} (relative error {factors.error(rank):.2g})"
        return rank

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        """Give the decided sites wider heads. Returns why sites were left, by site."""
        seen = _first(stage) if stage.tensors else {}
        left: dict[str, str] = {}
        gone: list[fx.Node] = []
        for key, (exact, rank) in decision.sites:
            region = stage.regions.get(key)
            parts = "the site is not recognised" if region is None else _split(stage, region)
            problem = parts if isinstance(parts, str) else None
            if not isinstance(parts, str):
                gone += [o.node for o in stage.regions[key].captures.values() if isinstance(o.node, fx.Node)]
                problem = _Site(stage, key, seen.get(key)).put(bool(exact), rank, self.name)
            if problem:
                left[key] = problem
        stage.empty(gone, [cut[0] for cut in decision.cuts])
        return left


def _first(stage: Stage) -> dict[str, Seen]:
    """What each site is given on the first calibration input."""
    found: dict[str, Seen] = {}
    whole = stage.calibration
    stage.calibration = replace(whole, batches=whole.batches[:1])
    try:
        stage.visit(lambda key, seen: found.setdefault(key, seen) and None)
    finally:
        stage.calibration = whole
    return found


def _split(stage: Stage, region: Region) -> Split | str:
    """The parts of the site's score; what loads tensors that depend on the model's inputs stays as it is."""
    if region.merge:
        return "a sum of attentions has several scores"
    parts = separable.split(region.spec)
    if isinstance(parts, str):
        return parts
    loaded = {x.args[0].name for f, g in parts.pairs for x in ex.loads(f, g)}
    loaded |= {x.args[0].name for x in ex.loads(parts.table)}
    for name in sorted(loaded):
        if not _is_state(stage, region.captures[name]):
            return f"its bias {name} depends on the model's inputs"
    return parts


def _is_state(stage: Stage, operand: Operand) -> bool:
    """Whether a tensor is computed from parameters, buffers and constants alone."""
    node = operand.node.table if isinstance(operand.node, Line) else operand.node
    return all(n.op != "placeholder" or n in stage.states for n in _behind([node]))


def _closed(parts: Split, seen: Seen, when: str) -> bool | str:
    """Whether the closed forms of a score are factored, or why not."""
    if not parts.pairs:
        return False
    if seen.q.dtype in (torch.float16, torch.bfloat16):
        return f"positions are not exact in {seen.q.dtype}"
    heads = seen.spec.heads
    if any(ex.depends(g, ex.h) for _, g in parts.pairs) and heads.k_map != tuple(range(heads.q)):
        return "its key side differs among the query heads of a key head"
    guess = cost.estimate(seen.q, seen.k, len(parts.pairs), False, separable.operations(parts.separable))
    return True if when == "always" or guess.pays else str(guess)


def _values(table: sp.Expr, seen: Seen) -> Tensor:
    """The table `[Hq, n_q, n_k]` in fp64."""
    heads, n_q, n_k = seen.spec.heads.q, seen.q.shape[2], seen.k.shape[2]
    axes = {ex.b: torch.arange(1), ex.h: torch.arange(heads), ex.q: torch.arange(n_q), ex.k: torch.arange(n_k)}
    sizes = dict(zip(ex.SIZES, (1, heads, n_q, n_k), strict=True))
    sizes |= {ex.scalar(n): int(x) for n, x in zip(seen.spec.scalars, seen.scalars, strict=False)}
    named = {c.name: t.cpu() for c, t in zip(seen.spec.captures, seen.captures, strict=False)}
    return evaluate(table, Scope(axes, sizes, named, None, torch.float64)).expand(1, heads, n_q, n_k)[0].double()


def _centred(spec: AttentionSpec) -> bool:
    return spec.normalizer == Softmax() and not spec.returns


class _Site:
    """One site while it gets wider heads."""

    def __init__(self, stage: Stage, key: str, seen: Seen | None) -> None:
        self.stage, self.key, self.seen = stage, key, seen

    def put(self, exact: bool, rank: int, name: str) -> str | None:
        """Let the site compute the same scores with less bias, or say why not."""
        learned = self._learned()
        region = self.stage.plain(self.key)
        if isinstance(region, Decline):
            return str(region)
        parts = separable.split(region.spec)
        assert not isinstance(parts, str)
        query, key = (Columns(self.stage, region, o, x) for o, x in ((region.query, ex.q), (region.key, ex.k)))
        try:
            columns = [(query.column(f / parts.scale), key.column(g)) for f, g in parts.pairs if exact]
        except NotImplementedError as error:
            return str(error)
        rest = parts.rest + (0 if exact else parts.separable) + (0 if rank else parts.table)
        captures = dict(region.captures)
        if rank > 0:
            factors = self._factors(parts, rank, learned)
            columns.append((query.spread(factors[0]), key.spread(factors[1])))
        elif rank == _LINE:
            captures["line"] = Operand(self._line(parts, learned), ("i0", "i1"))
            rest += ex.load("line", ex.h, ex.k - ex.q + ex.n_q - 1)
        wider = region.spec.heads.d_qk + (len(parts.pairs) if exact else 0) + max(rank, 0)
        spec = _leaner(region.spec, parts.scale * ex.s + rest, wider, rank == _LINE)
        changed = region.replace(spec=spec, captures={c.name: captures[c.name] for c in spec.captures})
        if columns:
            sides = zip(*columns, strict=True)
            joined = [x.joined(list(made)) for x, made in zip((query, key), sides, strict=True)]
            changed = changed.replace(
                query=replace(region.query, node=joined[0]), key=replace(region.key, node=joined[1])
            )
        found = self.stage.put(self.key, changed, name)
        return None if found is None else str(found)

    def _learned(self) -> bool:
        """Whether parameters make the table, so that its factors are parameters too."""
        nodes = [o.node for o in self.stage.regions[self.key].captures.values() if isinstance(o.node, fx.Node)]
        names = [self.stage.states[n] for n in _behind(nodes) if n in self.stage.states]
        return any(isinstance(self.stage.tensors.get(name), nn.Parameter) for name in names)

    def _kept(self, tensor: Tensor, learned: bool) -> Tensor:
        assert self.seen is not None
        dtype = next((t.dtype for t in self.seen.captures if t.is_floating_point()), self.seen.q.dtype)
        tensor = tensor.to(self.seen.q.device, dtype).contiguous()
        return nn.Parameter(tensor) if learned else tensor

    def _factors(self, parts: Split, rank: int, learned: bool) -> list[fx.Node]:
        """`phi [Hq, n_q, rank]`, divided by the scale of the scores, and `psi [Hk, n_k, rank]`."""
        made: list[tuple[Tensor, Tensor]] = []

        def make(place: int) -> Tensor:
            assert self.seen is not None
            spec = self.seen.spec
            if not made:
                made.append(Factors(_values(parts.table, self.seen), spec.heads.k_map, _centred(spec)).factors(rank))
            return self._kept(made[0][place] / (1 if place else float(parts.scale)), learned)

        return [self.stage.add(self.key, n, lambda i=i: make(i)) for i, n in enumerate(("phi", "psi"))]  # type: ignore[misc]

    def _line(self, parts: Split, learned: bool) -> fx.Node:
        def make() -> Tensor:
            assert self.seen is not None
            line = line_of(_values(parts.table, self.seen))
            assert line is not None
            return self._kept(line, learned)

        return self.stage.add(self.key, "line", make)


def _behind(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    queue, seen = list(nodes), set(nodes)
    while queue:
        fresh = [n for n in queue.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return seen


def _leaner(spec: AttentionSpec, score: sp.Expr, width: int, line: bool) -> AttentionSpec:
    """The spec with another score and head width, and only what it still loads."""
    parts = {**spec.expressions, "score": score}.values()
    names = {*ex.load_names(*parts)}
    captures = tuple(c for c in spec.captures if c.name in names)
    if line:
        captures = (*(c for c in captures if c.name != "line"), Capture("line", "float", (None, None)))
    symbols = {x.name for part in parts for x in part.free_symbols}
    return replace(
        spec, score=score, heads=replace(spec.heads, d_qk=width), captures=captures,
        scalars=tuple(n for n in spec.scalars if n in symbols),
    ).canonical()  # fmt: skip
