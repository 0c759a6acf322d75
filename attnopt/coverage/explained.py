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
        r".*", r"^top-k attention", r"gate|router|experts|mlp|moe|feed_forward",
        "A router: a linear layer of the token makes the scores, and the largest choose experts. No query meets a key.",
    ),
    Explanation(
        r"(mm-)?grounding-dino", r"computed from the scores", r"fusion_layer",
        "Text and image attend to each other over one set of scores, from which the largest of the whole batch is "
        "subtracted and which are then clamped to ±50000, twice. What is subtracted needs every score at once, and the "
        "clamp keeps it from being dropped as a constant of the row.",
        attention=True,
    ),
    Explanation(
        r"mgp-str", r"talking heads|no contraction of queries", r"a3_module",
        "A token learner: a convolution of the tokens makes one map for each character, and a softmax over the tokens "
        "sums them by it. No query meets a key.",
    ),
    Explanation(
        r"swiftformer", r"does not run over the keys", r"attn",
        "Additive attention: each query is weighed by its product with one learned vector, a softmax over an axis of "
        "length one, and the queries are summed. No query meets a key.",
    ),
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
    Explanation(
        r"deepseek_v4", r"does not run over the keys|Sinkhorn", r"layers\.\d+(\.(attn|ffn)_hc)?$",
        "Hyper-connections: each token makes a small matrix that mixes its own residual streams, and a few Sinkhorn "
        "steps make it doubly stochastic. No query meets a key.",
    ),
    Explanation(
        r"slanext", r"no contraction of queries and keys", r"",
        "Additive attention of a recurrent cell: a tanh of the sum of state and features, then one learned vector, "
        "make the scores. No query meets a key.",
    ),
    Explanation(
        r"phi4_multimodal_vision", r"while it is traced", r"",
        "With sdpa, transformers drops the mask where it looks and sees that nothing is masked, and its default is "
        "causal then; traced, it cannot look. The graph is another model, so the model runs as it is. Eager is fused.",
        attention=True,
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
