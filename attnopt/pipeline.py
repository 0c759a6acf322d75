"""The middle of every door: a captured graph in, the graph with its attention lowered and its sites out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx

from attnopt import patterns
from attnopt.errors import Decline
from attnopt.graph import drop_dead_code, module_path, source_line
from attnopt.options import Options
from attnopt.passes import PIPELINE
from attnopt.passes.base import check_order, run
from attnopt.passes.lower import Lowering
from attnopt.region import Region
from attnopt.report import Site
from attnopt.runtime import op  # noqa: F401  (registers attnopt::attention)

log = logging.getLogger("attnopt")


@dataclass(frozen=True)
class Found:
    """One site: its anchor, and either its region after the exact rewrites or why it was declined."""

    anchor: fx.Node
    pattern: str
    result: Region | Decline
    notes: tuple[Decline, ...] = field(default=())

    @property
    def note(self) -> str:
        """What the user should know of a fused site; empty if nothing."""
        escapes = self.result.escapes if isinstance(self.result, Region) else ()
        if not escapes:
            return ""
        place = module_path(self.anchor) or self.anchor.name
        return f"{place}: %{', %'.join(escapes)} is also used elsewhere, so it is still computed there."

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
            common["rewrites"] = approximate
            return Site(**common, status="declined", reason=str(self.result))  # type: ignore[arg-type]
        status = "rewritten" if approximate else status
        return Site(**common, spec=self.result.spec, status=status, rewrites=self.result.rewrites, **more)  # type: ignore[arg-type]


def find(graph: fx.Graph, constants: Mapping[str, torch.Tensor], options: Options) -> list[Found]:
    """Every site of the graph, after the exact rewrites. Changes nothing."""
    check_order(PIPELINE)
    found: list[Found] = []
    if options.disable:
        return found
    for anchor, pattern, result in patterns.find(graph, constants, options.patterns):
        notes: tuple[Decline, ...] = ()
        if isinstance(result, Region):
            if 0 <= options.fuel <= sum(isinstance(f.result, Region) for f in found):
                result = Decline(f"the limit of {options.fuel} rewritten sites is used up", anchor)
            else:
                # What an approximate rewrite did to the graph before stands on the anchor.
                result = result.replace(rewrites=tuple(anchor.meta.get("attnopt_rewrites", ())))
                result, declines = run(result, PIPELINE)
                notes = tuple(declines)
        found.append(Found(anchor, pattern, result, notes))
        log.debug("%s: %s", anchor, result.spec if isinstance(result, Region) else result)
    return found


def lower(gm: fx.GraphModule, found: Sequence[Found]) -> list[Found]:
    """Replace every found region by the operator, in place. Returns the sites, some now declined."""
    lowering, out = Lowering(gm), []
    for item in found:
        result = item.result
        if isinstance(result, Region):
            call = lowering.lower(result)
            if isinstance(call, Decline):
                result = call
        out.append(Found(item.anchor, item.pattern, result, item.notes))
    lowering.finish()
    drop_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return out


def dump(folder: str, gm: fx.GraphModule, found: Sequence[Found], step: str) -> None:
    """Write the graph as readable Python and the sites as text, for the curious and for bug reports."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{step}_graph.py").write_text(gm.print_readable(print_output=False))
    lines = [f"{f.anchor} [{f.pattern}] {f.result.spec if isinstance(f.result, Region) else f.result}" for f in found]
    (path / f"{step}_sites.txt").write_text("\n".join(lines) + "\n")
