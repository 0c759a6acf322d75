"""Rows as the harness writes them, for the tests of what reads them."""

from __future__ import annotations

from typing import Any


def site(status: str = "fused", **more: Any) -> dict[str, Any]:
    """A site of a row."""
    return {
        "name": "softmax", "module": "layer.0.attention", "source": "transformers/models/x/modeling_x.py:7",
        "pattern": "softmax", "status": status, "reason": "", "form": "softmax", "mask": "", "lengths": (13, 13),
        "spec": "4 heads, d=16; score s/4; keep k <= q and mask[b, k] (empty row: uniform)", **more,
    }  # fmt: skip


def row(architecture: str = "x", variant: str = "eager", **more: Any) -> dict[str, Any]:
    """A measured row with one fused site."""
    return {
        "architecture": architecture, "variant": variant, "status": "measured", "sites": [site()], "missed": [],
        "others": 0, "errors": {"units": 1.0, "fp64": 1e-15, "astray": 0, "fp64_astray": 0}, "s": 1.0, **more,
    }  # fmt: skip
