"""`ShareKV`: several query heads read one key-value head, as in grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnopt import expr as ex
from attnopt.errors import Decline, OptionError
from attnopt.passes.approximate import Decision
from attnopt.passes.base import APPROX, Approx, check_flag
from attnopt.passes.likeness import Alignment, align, moments
from attnopt.passes.merge_heads import Groups, Turns, share, weights
from attnopt.passes.stage import Sites, Stage
from attnopt.passes.tolerance import Loss
from attnopt.patterns import projections
from attnopt.patterns.projections import Projections
from attnopt.region import Region

METHODS = ("aligned", "mean")


@dataclass(frozen=True)
class ShareKV:
    """Let groups of heads share one key and one value head: projections and the KV cache shrink.

    `mean` averages the key and value rows of neighbouring heads (Ainslie et al. 2023). `aligned` first finds, on the
    calibration inputs, which heads resemble one another once they are rotated, moves them side by side and rotates
    them: values by any orthogonal matrix, which the output projection undoes, keys by rotations that commute with
    what stands between projection and scores, such as RoPE, which the queries undo (Jin et al. 2025). That step
    changes nothing but rounding; then groups are averaged.

    Attributes:
        kv_heads: how many key-value heads are left: a number, or module path (or number of the site) to number.
        method: `aligned` or `mean`.
        sites: which sites, where `kv_heads` is a number: module paths, patterns of them such as `layers.*.attn`,
            numbers in the report, or a function of module path and spec; None means all.
        merge: False stops after the alignment: the same function, in weights that are ready to be merged.
        loss: scalar loss of the model's output, for the tolerance; None means its `.loss`, else the mean square of
            its first floating tensor.

    Raises:
        OptionError: for arguments that do not fit; once the model is known, for sites that are not there, counts that
            do not divide, and `aligned` without calibration inputs.
    """

    kv_heads: int | Mapping[str | int, int]
    method: str = "aligned"
    sites: Sites = None
    merge: bool = True
    loss: Loss | None = None
    name: str = field(default="share_kv", init=False)
    contract: Approx = field(default=APPROX, init=False)
    requires: frozenset[str] = field(default=frozenset(), init=False)
    provides: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        check_flag("ShareKV", "merge", self.merge)
        if self.method not in METHODS:
            raise OptionError(f"ShareKV(method={self.method!r}) is unknown; choose one of {', '.join(METHODS)}.")
        named = isinstance(self.kv_heads, Mapping)
        counts = list(self.kv_heads.values()) if isinstance(self.kv_heads, Mapping) else [self.kv_heads]
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise OptionError(
                f"ShareKV(kv_heads={self.kv_heads!r}) must be a positive number, or map module paths to such numbers."
            )
        if named and self.sites is not None:
            raise OptionError("ShareKV takes sites= only with one number of heads; a mapping names its own.")

    def decide(self, stage: Stage) -> Decision:
        """Which heads of which sites are grouped; with `aligned`, also how they are rotated. Changes nothing."""
        if self.method == "aligned" and not stage.calibration.given:
            raise OptionError(
                "ShareKV(method='aligned') aligns heads on calibration inputs and saw none: pass calibration=[...] to "
                "optimize, or take method='mean'."
            )
        counts = self._counts(stage)
        candidates, declines = {}, []
        for key, count in counts.items():
            region = stage.regions.get(key)
            found = Decline(stage.declined[key]) if region is None else _fits(stage, key, region, count)
            if region is None or isinstance(found, Decline):
                declines.append((key, str(found)))
            else:
                candidates[key] = (region, found)
        plans, remarks = self._plans(stage, candidates, counts)
        sites, working = [], {}
        for key, plan in plans.items():
            if isinstance(plan, Decline):
                declines.append((key, str(plan)))
                continue
            sites.append((key, _encoded(plan.groups)))
            working[key] = plan.turns
        caches = [_cache(candidates[key][0], counts[key]) for key, _ in sites]
        before = sum(whole for whole, _ in caches)
        after = sum(less for _, less in caches) if self.merge else before
        figures = {"KV numbers a token before": before, "KV numbers a token after": after}
        return Decision(
            self.name, tuple(sites), declines=tuple(declines), figures=figures, remarks=remarks, working=working
        )

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        """Share the heads as decided, in the stage's graph and tensors. Returns why sites were left, by site."""
        left = {}
        for key, numbers in decision.sites:
            region = stage.regions.get(key)
            found = Decline("the site is not recognised") if region is None else projections.find(region)
            if region is not None and not isinstance(found, Decline):
                found = self._share(stage, region, found, _decoded(numbers), decision.working.get(key))
            if isinstance(found, Decline):
                left[key] = str(found)
        stage.gm.graph.lint()
        stage.gm.recompile()
        return left

    def _share(
        self, stage: Stage, region: Region, found: Projections, groups: Groups, turns: Turns | None
    ) -> Decline | None:
        names, spec = stage.states, region.spec
        cuts = share(stage.gm, region, found, groups) if self.merge else []
        if isinstance(cuts, Decline):
            return cuts
        if set(stage.tensors) - set(stage.added):  # else the model holds the new ones already
            own = {n: stage.tensors[names[n]] for n in _parameters(found)}
            for node, tensor in weights(found, spec.heads, groups, turns, own, self.merge).items():
                if not torch.equal(tensor, own[node]):
                    stage.tensors[names[node]] = torch.nn.Parameter(tensor, requires_grad=own[node].requires_grad)
        smaller = {cut.placeholder for cut in cuts}
        for cut in cuts:
            stage.cut(cut.placeholder, cut.dim, cut.keep)
        for node in _parameters(found) if self.method == "aligned" else ():
            if node not in smaller:
                # Of the same size, with other values: the optimised model holds its own.
                stage.cut(node, 0, tuple(range(node.meta["val"].shape[0])))
        return None

    def _counts(self, stage: Stage) -> dict[str, int]:
        """How many key-value heads each chosen site is to have."""
        if isinstance(self.kv_heads, Mapping):
            counts = {stage.key(site, self.name): n for site, n in self.kv_heads.items()}
        else:
            counts = dict.fromkeys(stage.choose(self.sites, self.name), self.kv_heads)
        uneven = {}
        for key, count in counts.items():
            have = stage.regions[key].spec.heads.k if key in stage.regions else count
            if have > count and have % count:
                uneven[key] = f"{key!r} has {have} key-value heads, which {count} does not divide"
        # One number for all sites may fit some of them, as after heads were pruned; the others are declined.
        if uneven and (isinstance(self.kv_heads, Mapping) or len(uneven) == len(counts)):
            raise OptionError(f"ShareKV(kv_heads={self.kv_heads}): {'; '.join(uneven.values())}.")
        return counts

    def _plans(
        self, stage: Stage, candidates: Mapping[str, tuple[Region, Projections]], counts: Mapping[str, int]
    ) -> tuple[dict[str, Alignment | Decline], tuple[tuple[str, str], ...]]:
        """The groups of each site and, with `aligned`, the rotations; and what is worth saying of them."""
        aligned = self.method == "aligned"
        seen = moments(stage, candidates) if aligned and candidates else {}
        plans, remarks = {}, []
        for key, (region, found) in candidates.items():
            plan = align(stage, region, found, counts[key], seen.get(key), _order_free(region))
            plans[key] = plan
            if isinstance(plan, Alignment):
                remarks += [(key, remark) for remark in plan.remarks]
        return plans, tuple(remarks)


def _fits(stage: Stage, key: str, region: Region, count: int) -> Projections | Decline:
    """The projections of a site whose heads can be shared."""
    heads = region.spec.heads
    if heads.k != heads.v or heads.k_map != heads.v_map:
        return Decline("keys and values are shared by heads in different ways", region.anchor)
    if heads.k <= count:
        return Decline(f"it has {heads.k} key-value heads already", region.anchor)
    if heads.k % count:
        return Decline(f"it has {heads.k} key-value heads, which {count} does not divide", region.anchor)
    if region.key.node is region.value.node:
        return Decline("keys and values are cut from one tensor only inside the attention", region.key.node)
    found = projections.find(region)
    if isinstance(found, Decline):
        return found
    for operand in (region.query, region.key, region.value):
        if "h" not in operand.dims:
            return Decline("batch and heads are one dimension of its operands", operand.node)
    shared = stage.shared(_parameters(found))
    if shared:
        return Decline(f"parameter {shared} is used under several names")
    for node in _parameters(found):
        if not node.meta["val"].is_floating_point():
            return Decline("its projections are quantised", node)
    return found


def _parameters(found: Projections) -> list[Any]:
    """The parameters of the four projections, each once."""
    maps = (found.q, found.k, found.v, found.o)
    return list(dict.fromkeys(p for x in maps for p in (x.weight, x.bias) if p is not None))


def _order_free(region: Region) -> bool:
    """Whether nothing but the projections tells heads apart, so that they may change places."""
    heads = region.spec.heads
    told = any(ex.h in e.free_symbols for e in region.spec.expressions.values())
    even = len({heads.k_map.count(k) for k in range(heads.k)}) == 1
    return even and not told and not region.escapes and not region.spec.returns


def _cache(region: Region, count: int) -> tuple[int, int]:
    """Numbers of keys and values that a token leaves in the cache, before and after."""
    heads = region.spec.heads
    each = heads.d_qk + heads.d_v
    return heads.k * each, count * each


def _encoded(groups: Groups) -> tuple[int, ...]:
    """Groups as numbers: how many, whether heads move, and the heads group by group."""
    return (len(groups.members), int(groups.moved), *(h for group in groups.members for h in group))


def _decoded(numbers: Sequence[int]) -> Groups:
    count, moved, *heads = numbers
    size = len(heads) // count
    return Groups(tuple(tuple(heads[i : i + size]) for i in range(0, len(heads), size)), bool(moved))
