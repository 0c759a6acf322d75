"""Finding attention. `PATTERNS` is the ordered list; each entry reads the site around one anchor node."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import fx

from attnopt.errors import Decline
from attnopt.patterns import sdpa, softmax
from attnopt.region import Region

log = logging.getLogger("attnopt")

PATTERNS = (
    ("sdpa", sdpa.match),
    ("softmax", softmax.match),
)


def find(
    graph: fx.Graph, constants: Mapping[str, torch.Tensor] | None = None
) -> list[tuple[fx.Node, str, Region | Decline]]:
    """Every site in graph order: its anchor, the pattern that claims it, and the region or why it was declined."""
    found = []
    for node in graph.nodes:
        for name, match in PATTERNS:
            try:
                result = match(node, constants or {})
            except Exception as error:  # a miss is never an error: what cannot be read stays as it is
                log.debug("%s at %s", name, node, exc_info=True)
                result = Decline(f"the site could not be read: {error}", node)
            if result is not None:
                found.append((node, name, result))
                break
    return found
