"""Finding attention. `PATTERNS` is the ordered list; each entry reads the site around one anchor node.

What a pattern's author may rely on is listed in `__all__` and described in `docs/adding-a-pattern.md`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.pattern import Pattern
from attnopt.patterns import byhand, called, chunks, flex, joined, linear, named, pointwise, sdpa, softmax, sums
from attnopt.patterns.known import BUDGET, TRIAL, Known
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import Masked, split
from attnopt.patterns.memo import searching
from attnopt.patterns.operands import Place
from attnopt.patterns.site import Frame, Parts, build, frame, width
from attnopt.patterns.soundness import sound
from attnopt.patterns.views import shape
from attnopt.region import Region

__all__ = [
    "PATTERNS", "Decline", "Frame", "Lifter", "Masked", "Parts", "Pattern", "Place", "Region", "arguments", "build",
    "find", "frame", "op_name", "shape", "split", "value", "width",
]  # fmt: skip

log = logging.getLogger("attnopt")

# Nodes that are a site whenever they stand between two contractions; the others are only tried.
ANCHORS = {*softmax.SOFTMAX, "aten::scaled_dot_product_attention", "aten::log_softmax", "attnopt::attention"}

PATTERNS = (
    Pattern("sdpa", sdpa.match),
    Pattern("flex", flex.match),
    Pattern("attnopt", called.match),
    Pattern("named", named.match),
    Pattern("sum", sums.match),
    Pattern("softmax", softmax.match),
    Pattern("chunks", chunks.match),
    Pattern("joined", joined.match),
    Pattern("softmax by hand", byhand.match),
    Pattern("pointwise", pointwise.match),
    Pattern("linear", linear.match),
)


def find(
    graph: fx.Graph,
    constants: Mapping[str, torch.Tensor] | None = None,
    patterns: Sequence[Pattern] | None = None,
) -> list[tuple[fx.Node, str, Region | Decline]]:
    """Every site in graph order: its anchor, the pattern that claims it, and the region or why it was declined.

    The first pattern that gives a region wins; where none does, the first that declines.
    """
    found: list[tuple[fx.Node, str, Region | Decline]] = []
    chosen = PATTERNS if patterns is None else patterns
    known = constants if isinstance(constants, Known) else Known(constants or {})
    joined.forget(graph)
    with searching():
        for node in list(graph.nodes):  # a pattern may write what it reads into the graph
            known.budget = BUDGET if op_name(node) in ANCHORS else TRIAL
            claim: tuple[str, Region | Decline] | None = None
            for pattern in chosen:
                result = _read(pattern, node, known)
                if isinstance(result, Region):
                    claim = (pattern.name, result)
                    break
                if result is not None:
                    claim = claim or (pattern.name, result)
            if claim is not None:
                found.append((node, *claim))
    return _once(found)


def _once(found: list[tuple[fx.Node, str, Region | Decline]]) -> list[tuple[fx.Node, str, Region | Decline]]:
    """Without anchors that another region explains, and without a second region for the same output."""
    regions = [result for _, _, result in found if isinstance(result, Region)]
    claimed = {anchor for region in regions for anchor in (*region.claims, region.output)}
    explained = {anchor for region in regions for anchor in region.claims if anchor is not region.anchor}
    first: dict[fx.Node, fx.Node] = {}
    for node, _, result in found:
        if isinstance(result, Region):
            first.setdefault(result.output, node)
    return [
        (node, name, result)
        for node, name, result in found
        if node not in explained
        and not (node in claimed if isinstance(result, Decline) else first[result.output] is not node)
    ]


def _read(pattern: Pattern, node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    own = pattern in PATTERNS
    try:
        found = pattern.match(node, constants)
    except Exception as error:  # a miss is never an error: what cannot be read stays as it is
        log.debug("%s at %s", pattern.name, node, exc_info=True)
        if own and op_name(node) not in ANCHORS:
            return None  # one of the many nodes at which a pattern looks in case they end an attention
        who = "the site could not be read" if own else f"pattern {pattern.name!r} raised {type(error).__name__}"
        return Decline(f"{who}: {error}", node)
    return found if own else sound(found, pattern.name, node)
