"""Ask what would be fused, and why something would not be. Nothing is changed or compiled."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import attnopt


class TwoHeads(nn.Module):
    """One ordinary attention, and one whose weights are sorted first: no kernel computes that."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / 4
        plain = torch.softmax(scores, dim=-1) @ v
        odd = torch.softmax(scores.sort(dim=-1).values, dim=-1) @ v
        return plain + odd


q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
report = attnopt.explain(TwoHeads(), (q, k, v))
print(report)

assert report.fused == 1
assert report.declined == 1
(declined,) = (site for site in report.sites if site.status == "declined")
assert declined.reason
assert "02_explain.py" in declined.source

with tempfile.TemporaryDirectory() as folder:
    page = report.to_html(Path(folder) / "report.html")
    assert "declined" in page.read_text()
    assert '"declined": 1' in report.to_json()
