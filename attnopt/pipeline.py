"""The middle of every door: a captured graph in, the graph with its attention lowered and its sites out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch._logging._internal import trace_structured_artifact

from attnopt import dump, patterns
from attnopt.errors import Decline
from attnopt.graph import drop_dead_code, module_path, op_name, source_line, value
from attnopt.hints import hint_for
from attnopt.nested import everywhere
from attnopt.options import Options
from attnopt.passes import PIPELINE, add_up, gates
from attnopt.passes.agents import agents
from attnopt.passes.base import check_order, run
from attnopt.passes.liveness import bystanders, used_elsewhere
from attnopt.passes.lower import Lowering
from attnopt.passes.nearest import blocking
from attnopt.region import Region
from attnopt.report import Bystander, Report, Site
from attnopt.runtime import op
from attnopt.runtime import side as _side  # noqa: F401  defines the operator that lowered graphs may call
from attnopt.runtime.sdpa import cheaper, sdpa_scale

log = logging.getLogger("attnopt")


@dataclass(frozen=True)
class Found:
    """One site: its anchor, and either its region after the exact rewrites or why it was declined.

    `used` says who uses inner values of a fused site, which are then still computed. `left` says why a site stays the
    `scaled_dot_product_attention` that it is in the source.
    """

    anchor: fx.Node
    pattern: str
    result: Region | Decline
    notes: tuple[Decline, ...] = field(default=())
    used: str = ""
    left: str = ""

    @property
    def note(self) -> str:
        """What the user should know of a fused site; empty if nothing."""
        left = self.left and f"scaled_dot_product_attention, because {self.left}"
        told = "; ".join(filter(None, (self.used, left)))
        return f"{module_path(self.anchor) or self.anchor.name}: {told}" if told else ""

    def site(self, status: str = "fused", **more: object) -> Site:
        """The report's entry."""
        common = {
            "name": self.anchor.name,
            "module_path": module_path(self.anchor),
            "source": source_line(self.anchor) or "",
            "pattern": self.pattern,
        }
        approximate = self.anchor.meta.get("attnopt_rewrites", ())
        if isinstance(self.result, Decline):
            stopped = self.result.node
            stopped = blocking(self.anchor) or stopped if stopped is self.anchor else stopped
            common |= {"rewrites": approximate, "reason": str(self.result), "node": _described(stopped)}
            common["hint"] = self.result.hint or hint_for(self.result.reason)
            return Site(**common, status="declined")  # type: ignore[arg-type]
        status = "rewritten" if approximate else status
        more = {"kernel": "sdpa", **more} if self.left else more
        return Site(**common, spec=self.result.whole, status=status, rewrites=self.result.rewrites, **more)  # type: ignore[arg-type]


def find(graph: fx.Graph, constants: Mapping[str, torch.Tensor], options: Options) -> list[Found]:
    """Every site of the graph, after the exact rewrites. Changes nothing."""
    check_order(PIPELINE)
    if options.disable:
        return []
    found = _sites(graph, constants, options, 0)
    for body in everywhere(graph.owning_module):
        inner = _sites(body.gm.graph, {}, options, sum(isinstance(f.result, Region) for f in found))
        closed = Decline(body.closed, body.call) if body.closed else None
        found += [replace(f, result=closed or f.result) if isinstance(f.result, Region) else f for f in inner]
    _tell("found", graph.owning_module, found)
    return found


def _sites(graph: fx.Graph, constants: Mapping[str, torch.Tensor], options: Options, spent: int) -> list[Found]:
    """The sites of one graph without those of its bodies; `spent` is the fuel that is used up."""
    found: list[Found] = []
    for anchor, pattern, result in patterns.find(graph, constants, options.patterns):
        notes: tuple[Decline, ...] = ()
        if isinstance(result, Region):
            if 0 <= options.fuel <= spent + sum(isinstance(f.result, Region) for f in found):
                result = Decline(f"the limit of {options.fuel} rewritten sites is used up")
            else:
                # What an approximate rewrite did to the graph before stands on the anchor.
                result = result.replace(rewrites=tuple(anchor.meta.get("attnopt_rewrites", ())))
                result, declines = run(result, PIPELINE)
                notes = tuple(declines)
        found.append(Found(anchor, pattern, result, notes))
    return _summed(found)


def _summed(found: list[Found]) -> list[Found]:
    """Attentions that are added to one another as one site, the first's; the two halves of agent attention named."""
    sums = add_up.join(f.result for f in found if isinstance(f.result, Region))
    gone = {anchor for region in sums.values() for anchor in region.claims}
    sums = {anchor: run(region, (gates.RULE,))[0] for anchor, region in sums.items()}
    found = [replace(f, result=sums.get(f.anchor, f.result)) for f in found if f.anchor not in gone]
    named = agents(f.result for f in found if isinstance(f.result, Region))
    return [replace(f, pattern="agent") if f.anchor in named else f for f in found]


def leave(found: Sequence[Found], options: Options) -> list[Found]:
    """The sites, marked those that should stay `scaled_dot_product_attention`: plain, short, of known sizes."""
    return [replace(f, left=_left(f)) for f in found] if options.kernel == "auto" else list(found)


def _left(found: Found) -> str:
    region, node = found.result, found.anchor
    if not isinstance(region, Region) or region.merge or region.output is not node or region.rewrites:
        return ""
    if op_name(node) != "aten::scaled_dot_product_attention" or sdpa_scale(region.spec.canonical()) is None:
        return ""
    given = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False)) | node.kwargs
    if given.get("attn_mask") is not None:
        return ""
    return cheaper(*(value(given[name]) for name in ("query", "key", "value")))


def lower(gm: fx.GraphModule, found: Sequence[Found], again: bool = False) -> list[Found]:
    """Replace every found region that is not left by the operator, in place. Returns the sites, some now declined.

    `again`: weights that the source keeps for others are made again by an operator, where they are known as such.
    """
    modules = [gm, *(body.gm for body in everywhere(gm))]
    out = [f for module in modules for f in _lower(module, [f for f in found if f.anchor.graph is module.graph], again)]
    _tell("lowered", gm, out)
    return out


def _lower(gm: fx.GraphModule, found: Sequence[Found], again: bool) -> list[Found]:
    """`lower` for one graph without its bodies."""
    lowering, out = Lowering(gm, again), []
    for item in found:
        result = item.result
        if isinstance(result, Region) and not item.left:
            call = _lowered(lowering, result)
            if isinstance(call, Decline):
                result = call
        out.append(replace(item, result=result))
    lowering.finish()
    used = used_elsewhere(gm.graph, [f.result for f in out if isinstance(f.result, Region) and not f.left])
    out = [replace(f, used=used.get(f.anchor, "")) for f in out]
    drop_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return out


def _lowered(lowering: Lowering, region: Region) -> fx.Node | Decline:
    """The operator's node. What a failed attempt left behind is dead code, which is dropped later."""
    try:
        return lowering.lower(region)
    except Exception as error:  # a miss is never an error, above all not one of somebody else's pattern
        log.debug("%s", region.anchor, exc_info=True)
        return Decline(f"the site could not be rewritten: {type(error).__name__}: {error}", region.anchor)


def past_dispatcher(gm: fx.GraphModule) -> None:
    """Make a lowered graph that is run as it is call the operator as a function, which is cheaper; in place.

    Where anybody looks on, as another compiler does, the function is the operator.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.attnopt.attention.default:
            node.target = op.called
    gm.recompile()


NORMALISERS = ("aten::softmax", "aten::_softmax", "aten::special_softmax", "aten::log_softmax", "aten::_log_softmax")


def others(graph: fx.Graph, found: Sequence[Found]) -> tuple[Bystander, ...]:
    """Softmaxes of a graph that is not lowered yet that are part of no attention: routers, classifiers, gates."""
    taken = {f.anchor for f in found}
    for region in (f.result for f in found if isinstance(f.result, Region)):
        taken |= region.claims | {n for term in region.terms for n in term.inner}
    graphs = [graph, *(body.gm.graph for body in everywhere(graph.owning_module))]
    return tuple(
        Bystander(node.name, module_path(node), source_line(node) or "", reason)
        for one in graphs
        for node, reason in bystanders(one, NORMALISERS, taken)
    )


def announce(report: Report) -> Report:
    """Log the summary, hand the report to torch's structured trace (`TORCH_TRACE`, read by tlparse), dump it."""
    log.info("%s%s", f"{report.model}: " if report.model else "", report.summary)
    trace_structured_artifact("attnopt_report", "string", payload_fn=report.to_text)
    if dump.active():
        dump.step("report", {".txt": report.to_text(every=True), ".json": report.to_json()})
    return report


def _tell(step: str, gm: torch.nn.Module | None, found: Sequence[Found]) -> None:
    """One debug line for the step and one for each site; with a dump, the graph, the sites and their specs as text."""
    fused = [f for f in found if isinstance(f.result, Region)]
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %d of %d sites are fused", step, len(fused), len(found))
        for item in found:
            log.debug("%s: %s", step, _line(item))
    if dump.active() and gm is not None:
        specs = {r.whole.key: r.whole.text for r in (f.result for f in fused) if isinstance(r, Region)}
        dump.graph(step, gm, {
            "_sites.txt": "\n".join(map(_line, found)) or "no sites",
            "_specs.txt": "\n".join(f"{key} {text}" for key, text in specs.items()) or "no specs",
        })  # fmt: skip


def _line(item: Found) -> str:
    place = " ".join(filter(None, (module_path(item.anchor), source_line(item.anchor))))
    what = f"{item.result.whole}" if isinstance(item.result, Region) else f"declined: {item.result}"
    return f"%{item.anchor.name}{f' in {place}' if place else ''} [{item.pattern}] {what}"


def _described(node: object) -> str:
    """A node as a person finds it: `%sort = aten::sort [2, 4, 8, 8] float32 (model.py:12)`; empty for none."""
    if not isinstance(node, fx.Node):
        return ""
    seen, line = value(node), source_line(node)
    parts = seen if isinstance(seen, (tuple, list)) else (seen,)
    shapes = [f"{[*map(str, x.shape)]}".replace("'", "") + f" {str(x.dtype).removeprefix('torch.')}"
              for x in parts if isinstance(x, torch.Tensor)]  # fmt: skip
    what = op_name(node) or (node.op if node.op != "call_function" else getattr(node.target, "__name__", "call"))
    return f"%{node.name} = {what} {', '.join(shapes)}".rstrip() + (f" ({line})" if line else "")
