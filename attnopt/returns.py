"""Side outputs that a spec may return: their names, and what rows without keys and rows left out have. Free of torch.

With `p` the normalised weights of a row, before `weight`, `gate` and dropout:

- `lse` `[B, H, n_q]`: logarithm of the sum of exponentials, a sink's among them.
- `entropy` `[B, H, n_q]`: `-sum p log p` in nats, over the keys and the sink.
- `max`, `log_sum` `[B, H, n_q]`: the largest logit (a sink's among them) and the logarithm of the sum of exponentials
  measured from it. Their sum is lse; apart they keep the digits that lse loses beside large logits.
- `column_mass` `[B, H, n_k]`: `sum over queries of p`. `weights` `[B, H, n_q, n_k]`: `p`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnopt.errors import SpecError

# What a forward kernel makes beside its result, fp32 numbers of a row; and what takes another visit of the keys.
ROWS = ("lse", "entropy", "max", "log_sum")
PAIRS = ("column_mass", "weights")
# What weights can be made of again.
AGAIN = ("max", "log_sum")
# A row that is not computed (`rows`), and one without any key; the entropy of the latter is the policy's.
SKIPPED = {"lse": -math.inf, "entropy": 0.0, "max": 0.0, "log_sum": math.inf}
NOTHING = {"lse": -math.inf, "max": -math.inf, "log_sum": 0.0}


def of_rows(returns: Sequence[str]) -> tuple[str, ...]:
    """The side outputs that come with the result, in order: several are the last dimension of one tensor."""
    return tuple(name for name in returns if name in ROWS)


def check(returns: Sequence[str], softmax: bool, merged: bool) -> None:
    """Raise `SpecError` for side outputs that an attention does not have."""
    unknown = set(returns) - {*ROWS, *PAIRS}
    if unknown or len(set(returns)) != len(returns):
        raise SpecError(f"unknown side outputs: {tuple(returns)}; there are {', '.join((*ROWS, *PAIRS))}, each once.")
    more = [name for name in returns if name != "lse"]
    if more and merged:
        raise SpecError(f"{', '.join(more)} of attentions that are added up: ask each of them.")
    if not softmax and set(more) & set(ROWS):
        raise SpecError(
            f"{', '.join(x for x in more if x in ROWS)}: only the weights of a softmax are a distribution; this "
            f"normaliser is none."
        )
