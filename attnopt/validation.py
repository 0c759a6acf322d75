"""Validation of a rewritten graph on example inputs, site by site and as a whole.

Every site is computed three times from the same operands: G, the source's own nodes in fp64; E, the same nodes
in the run's dtype; K, what replaced them. K must be as close to G as E is, within the contract.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from attnopt.aliasing import mutated_argument
from attnopt.options import Options
from attnopt.pipeline import Found
from attnopt.region import Line, Region
from attnopt.runtime.reference import reference
from attnopt.runtime.validate import Verdict, compare
from attnopt.spec import AttentionSpec

# Above this many fp64 scores a site is checked on sampled rows of the reference instead of the source's nodes.
_MOST_SCORES = 2**26
_ROWS = 32
_ATTENTION = torch.ops.attnopt.attention.default


def validate_graphs(
    original: fx.GraphModule, lowered: fx.GraphModule, found: Sequence[Found], inputs: Sequence[Any], options: Options
) -> tuple[dict[str, str], dict[str, dict[str, float]], dict[str, Any]]:
    """Sites that failed with the reason, figures by site, and figures of the whole output."""
    regions = [f.result for f in found if isinstance(f.result, Region)]
    inputs = _untouchable(original, inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        checker = _Checker(original, lowered, regions)
        state = torch.random.get_rng_state()
        before = checker.run(*_untouchable(original, inputs))
        torch.random.set_rng_state(state)
        failed = {name: verdict.reason for name, verdict in checker.verdicts.items() if not verdict.ok}
        after = lowered(*_untouchable(lowered, inputs)) if regions and not failed else before
    errors = {name: _figures(verdict) for name, verdict in checker.verdicts.items()}
    # A site with active dropout draws another mask: the outputs differ by chance, and say nothing.
    random = any(term.spec.dropout for region in regions for term in region.terms)
    figures = {"validation": _whole(before, after)} if regions and not random else {}
    return failed, errors, figures


def _figures(verdict: Verdict) -> dict[str, float]:
    return {"max": verdict.max, "rms": verdict.rms, "eager_max": verdict.max_eager, "eager_rms": verdict.rms_eager}


def _whole(before: Any, after: Any) -> dict[str, float]:
    """Largest and root-mean-square change of the model's outputs, and the outputs' own root mean square."""
    pairs = [
        (x, y) for x, y in zip(before, after, strict=True) if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    if not pairs or not any(x.numel() for x, _ in pairs):
        return {}
    change = torch.cat([(x.double() - y.double()).flatten() for x, y in pairs])
    size = torch.cat([x.double().flatten() for x, _ in pairs])
    # Where both are infinite or both NaN nothing changed.
    same = torch.cat([((x == y) | (x.isnan() & y.isnan())).flatten() for x, y in pairs])
    change = change.masked_fill(same, 0.0)
    finite = size.masked_fill(~size.isfinite(), 0.0)
    return {
        "change_max": change.abs().max().item(),
        "change_rms": change.square().mean().sqrt().item(),
        "output_rms": finite.square().mean().sqrt().item(),
    }


def _untouchable(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with copies of those that the graph writes to."""
    written: set[fx.Node] = set()
    for node in gm.graph.nodes:
        target = mutated_argument(node)
        if node.op == "call_function" and getattr(node.target, "__name__", "").startswith("batch_norm"):
            written.update(n for n in node.all_input_nodes if n.op == "placeholder")
        while target is not None and target.op != "placeholder":
            target = next(iter(target.all_input_nodes), None)
        if target is not None:
            written.add(target)
    names = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [
        x.clone() if n in written and isinstance(x, torch.Tensor) else x for n, x in zip(names, inputs, strict=True)
    ]


class _Checker(fx.Interpreter):
    """Runs the original graph; at each site's output, compares the three computations."""

    def __init__(self, original: fx.GraphModule, lowered: fx.GraphModule, regions: Sequence[Region]) -> None:
        super().__init__(original)
        self.after, self.all_regions = lowered, regions
        names = {n.name for n in original.graph.nodes}
        regions = [r for r in regions if r.output.name in names]
        self.regions = {r.output.name: r for r in regions}
        self.held = {r.output.name: _held(r, names) for r in regions}
        self.lowered = {n.name: n for n in lowered.graph.nodes}
        self.calls = {n.meta["attnopt_site"]: n for n in lowered.graph.nodes if "attnopt_site" in n.meta}
        self.verdicts: dict[str, Verdict] = {}
        self.pending: dict[str, int] = {}
        self.kept: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        for region in regions:
            for name in self.held[region.output.name]:
                self.pending[name] = self.pending.get(name, 0) + 1

    def run_node(self, n: fx.Node) -> Any:
        result = self._inside(n) if isinstance(n.target, HigherOrderOperator) else self._plain(n)
        if n.op == "placeholder" or _leaves_vmap(n, result):
            self.given[n.name] = result
        if n.name in self.pending:
            self.kept[n.name] = result
        region = self.regions.get(n.name)
        if region is not None:
            self._check(n, region, result)
            for name in self.held[n.name]:
                self.pending[name] -= 1
                if not self.pending[name]:
                    self.kept.pop(name, None)
        return result

    def _plain(self, n: fx.Node) -> Any:
        """A node's value. What an approximate rewrite put into the graph is measured by its definition, if it fits."""
        if n.target is _ATTENTION:
            given, _ = self.fetch_args_kwargs_from_env(n)
            scores = given[0].shape[:3].numel() * given[1].shape[2]
            if scores <= _MOST_SCORES and not AttentionSpec.parse(given[5]).dropout:
                return _defined(*given)
        return super().run_node(n)

    def _inside(self, n: fx.Node) -> Any:
        """An operator with bodies; where a body is run once and as it is, so are its checks."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        kind = n.target.name()  # type: ignore[union-attr]
        if kind == "wrap_with_autocast":
            with torch.autocast(*args[:4]):
                return self._body(n.args[4]).run(*args[5:])
        if kind == "tag_activation_checkpoint":
            return self._body(n.args[0]).run(*args[1:])
        if kind == "cond":
            return self._body(n.args[1 if args[0] else 2]).run(*args[3])
        return super().run_node(n)

    def _body(self, node: Any) -> _Checker:
        name = str(node.target)
        original, lowered = (m.get_submodule(name) for m in (self.module, self.after))
        checker = _Checker(original, lowered, tuple(self.all_regions))  # type: ignore[arg-type]
        checker.verdicts = self.verdicts
        return checker

    def _check(self, n: fx.Node, region: Region, eager: torch.Tensor) -> None:
        call = self.calls.get(region.anchor.name)
        if call is None or region.spec.dropout or not isinstance(eager, torch.Tensor):
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(eager):
            return
        seeds = {**self.given, **{name: self.kept[name] for name in self.held[n.name]}}
        for made in (o for o in _operands(region) if o.name not in seeds):
            _evaluate(made, seeds, self.module, double=False)
        if _scores(region, seeds) > _MOST_SCORES:
            self.verdicts[region.anchor.name] = self._sampled(call, region, seeds)
            return
        try:
            kernel = _evaluate(call, dict(seeds), self.module, double=False)
        except Warning:
            raise
        except Exception as error:  # a kernel that cannot run here is a site that stays as it is
            reason = f"what replaced it raised {type(error).__name__}: {error}"
            self.verdicts[region.anchor.name] = Verdict(False, torch.inf, torch.inf, 0.0, 0.0, reason)
            return
        golden = _evaluate(n, dict(seeds), self.module, double=True)
        self.verdicts[region.anchor.name] = compare(golden, eager, kernel)

    def _sampled(self, call: fx.Node, region: Region, seeds: Mapping[str, Any]) -> Verdict:
        """The kernel against the reference on a sample of query rows, where all scores would not fit in memory."""
        known = dict(seeds)
        _evaluate(call, known, self.module, double=False)
        operator = next(n for n in self.lowered.values() if n.meta.get("attnopt_call") == region.anchor.name)
        q, k, v, captures, scalars, _ = fx.node.map_aggregate(
            operator.args, lambda x: known[x.name] if isinstance(x, fx.Node) else x
        )
        rows = torch.linspace(0, q.shape[2] - 1, _ROWS, dtype=torch.int64).unique()
        wide = [x.double() if x.is_floating_point() else x for x in (q, k, v, *captures)]
        golden, _ = reference(region.spec, *wide[:3], wide[3:], scalars, rows=rows)
        eager, _ = reference(region.spec, q, k, v, captures, scalars, rows=rows)
        return compare(golden, eager, known[operator.name][0][:, :, rows])


def _leaves_vmap(node: fx.Node, result: Any) -> bool:
    """Whether the node ends a `vmap` that was traced with the model: what is inside cannot be computed by itself."""
    ends = getattr(node.target, "__name__", "") == "_remove_batch_dim"
    return ends and not torch._C._functorch.is_functorch_wrapped_tensor(result)


def _scores(region: Region, seeds: Mapping[str, Any]) -> int:
    """How many scores the site has."""
    query, key = seeds[region.query.node.name], seeds[region.key.node.name]
    keys = key.shape[region.key.dims.index("k")] if "k" in region.key.dims else 1
    return query.numel() // region.spec.heads.d_qk * int(keys)


def _operands(region: Region) -> list[fx.Node]:
    terms = region.terms
    captured = (o.node.table if isinstance(o.node, Line) else o.node for r in terms for o in r.captures.values())
    return list(dict.fromkeys([*(o.node for r in terms for o in (r.query, r.key, r.value)), *captured]))


def _held(region: Region, names: Container[str]) -> list[str]:
    """What the site's operands are computed from: themselves, but for those that a pattern wrote into the graph."""
    queue, found = _operands(region), dict[str, None]()
    while queue:
        node = queue.pop(0)
        if node.name in names:
            found[node.name] = None
        else:
            queue += node.all_input_nodes
    return list(found)


def _evaluate(node: fx.Node, known: dict[str, Any], module: fx.GraphModule, double: bool) -> Any:
    """The value of a node from known values of nodes, depth first; in fp64 if asked."""
    stack = [node]
    while stack:
        current = stack[-1]
        if current.name in known:
            stack.pop()
            continue
        waiting = [a for a in current.all_input_nodes if a.name not in known]
        if waiting:
            stack.extend(waiting)
            continue
        known[current.name] = _apply(current, known, module, double)
        stack.pop()
    return known[node.name]


def _apply(node: fx.Node, known: Mapping[str, Any], module: fx.GraphModule, double: bool) -> Any:
    if node.op == "get_attr":
        return getattr(module, str(node.target))
    if node.op != "call_function":
        raise RuntimeError(f"%{node.name} was not computed before it was needed.")

    def convert(x: Any) -> Any:
        if isinstance(x, fx.Node):
            x = known[x.name]
        if double and isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.double()
        return torch.float64 if double and isinstance(x, torch.dtype) and x.is_floating_point else x

    args = fx.node.map_aggregate(node.args, convert)
    kwargs = fx.node.map_aggregate(node.kwargs, convert)
    if double and node.target is _ATTENTION:
        return _defined(*args)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _defined(q: Any, k: Any, v: Any, captures: Any, scalars: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a call of the operator computes by its definition, whatever kernel would run it."""
    return reference(AttentionSpec.parse(text), q, k, v, captures, scalars)
