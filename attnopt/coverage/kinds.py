"""What kind of attention a site is, in a few words, from its lengths and its spec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MARKS: tuple[tuple[str, str], ...] = (
    ("window", r"q <= k \+ \d|\bwindow\b"),
    ("padding", r"keep .*mask\d?\[b, k\]|\bpadding\b"),
    ("documents", r"ids\d?\[b, q\] == ids|\bdocument"),
    ("bias", r"\bbias\d?\["),
    ("soft-cap", r"\btanh\("),
    ("sink", r"\bsink\b"),
)
"""Marks of a spec's text, in the order in which they are named behind `causal`."""


def kind(site: Mapping[str, Any], variant: str) -> str:
    """Such as `self, causal, padding, grouped heads` or `decode`; the form first where it is not plain softmax."""
    words = [] if site.get("form", "softmax") in ("", "softmax") else [site["form"]]
    words.append(_shape(site.get("lengths"), variant))
    spec = site.get("spec", "")
    words += ["causal"] if _causal(spec, site.get("lengths")) else []
    words += [name for name, pattern in _MARKS if re.search(pattern, spec)]
    heads = re.match(r"(\d+)/(\d+) heads", spec)
    if heads:
        words.append("one key head" if heads[2] == "1" else "grouped heads")
    return ", ".join(words)


def _causal(spec: str, lengths: Any) -> bool:
    """Whether a query sees no key behind its own place, which is at the end where keys are more than queries."""
    bound = re.search(r"\bk <= q(?: \+ (\d+))?", spec)
    if bound is None:
        return re.search(r"\bcausal\b", spec) is not None
    further = int(bound[1] or 0)
    return further == 0 or (lengths is not None and further == lengths[1] - lengths[0])


def _shape(lengths: Any, variant: str) -> str:
    if variant.startswith("decode"):
        return "decode"
    if not lengths:
        return "self"
    queries, keys = lengths
    return "self" if queries == keys else "cross"
