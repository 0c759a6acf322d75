"""Gradients of keys and values by the query heads that read them.

Where each head has its own run of query heads, one program adds up the run. Any other sharing (tables after a rewrite,
maps of keys and values that differ) has a program for each query head, in fp32, and the launcher adds up: in the same
order every time, without atomics.
"""

from __future__ import annotations

from attnopt.spec import Heads

# Statements of the launcher: gradients for each query head, and their sums.
BY_HEAD = (
    "dq, dk, dv = q.new_empty(q.shape), *"
    "(q.new_empty((batch, heads, *t.shape[2:]), dtype=torch.float32) for t in (k, v))"
)
ADDED = "dk, dv = added(dk, KEY_READERS, k), added(dv, VALUE_READERS, v)"


def by_runs(heads: Heads) -> bool:
    """Whether each head of keys and values has its own run of query heads, whose gradients one program adds up."""
    return heads.k_map == heads.v_map == tuple(h // max(1, heads.q // heads.k) for h in range(heads.q))


def readers(heads: Heads) -> list[str]:
    """The query heads that read each head of keys and values, and the function that adds up what they found."""
    tables = (("KEY_READERS", heads.k, heads.k_map), ("VALUE_READERS", heads.v, heads.v_map))
    return [
        *(f"{name} = {[[h for h, x in enumerate(table) if x == i] for i in range(n)]}" for name, n, table in tables),
        "",
        "",
        "def added(parts, readers, like):",
        '    """Gradients [B, H, n, d] of each query head, added up by the head that it reads."""',
        "    found = torch.zeros(like.shape, dtype=torch.float32, device=like.device)",
        "    for head, heads in enumerate(readers):",
        "        for h in heads:",
        "            found[:, head] += parts[:, h]",
        "    return found.to(like.dtype)",
        "",
        "",
    ]
