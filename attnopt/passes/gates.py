"""Exact: a factor of every head's output after the attention becomes the gate of the attention.

Head masks, head gains, mixtures of heads and the scale of an adapter. Only where nothing else uses the output, the
factor is the same for all features, and the product has the output's own dtype.
"""

from __future__ import annotations

from attnopt.passes.base import Rule
from attnopt.patterns.gates import absorb, following
from attnopt.region import Region

_MOST = 4


def apply(region: Region) -> Region:
    """The region with the factors that follow it; the same object if there are none."""
    for _ in range(_MOST):
        scaled = following(region)
        found = None if scaled is None else absorb(region, scaled)
        if found is None:
            return region
        region = found
    return region


RULE = Rule("gates", apply, output=True)
