"""Why a site that is declined is declined rightly: one row for each reason, looked up by architecture and reason.

A decline without a row here is an open failure, and the report says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Explanation:
    """What the site is and why it is left alone.

    Attributes:
        architectures: an expression that the whole name matches.
        reason: an expression found in the reason.
        module: an expression found in the module path.
        text: the explanation, one sentence or two.
        attention: whether it is softmax attention that a kernel could serve; those that are not do not count as sites.
    """

    architectures: str
    reason: str
    module: str
    text: str
    attention: bool = False


EXPLANATIONS: tuple[Explanation, ...] = (
    Explanation(
        r"convbert", r"no contraction of queries and keys", r"attention",
        "A dynamic convolution: a linear layer of the token itself makes the kernel that its neighbours are summed "
        "with. No query meets a key.",
    ),
    Explanation(
        r"groupvit.*", r"does not run over the keys", r"assign",
        "Each token is given to one group: the softmax runs over the groups, which are the queries, and its largest "
        "entry becomes one and the others zero.",
    ),
)  # fmt: skip


def explain(row: Mapping[str, Any], site: Mapping[str, Any]) -> Explanation | None:
    """The row that explains why the site is declined, or None."""
    for found in EXPLANATIONS:
        if (
            re.fullmatch(found.architectures, row["architecture"])
            and re.search(found.reason, site["reason"])
            and re.search(found.module, site["module"])
        ):
            return found
    return None
