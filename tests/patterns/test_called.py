"""Calls of the operator in a graph are sites."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

import attnopt
from attnopt.runtime.op import attention
from tests.runtime.cases import BIASED, CAUSAL, inputs


class Calls(nn.Module):
    def __init__(self, spec: object, lse: bool = False) -> None:
        super().__init__()
        self.spec, self.lse = spec, lse

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *captures: torch.Tensor) -> torch.Tensor:
        out, lse = attention(self.spec, q, k, v, captures)
        return out + lse.unsqueeze(-1) if self.lse else out


def test_a_call_is_read_by_its_spec() -> None:
    q, k, v = inputs(CAUSAL)
    fast = attnopt.optimize(Calls(CAUSAL), (q, k, v))
    (site,) = fast.report.sites
    assert (site.status, site.pattern) == ("fused", "attnopt")
    assert site.spec is not None
    assert site.spec.text == CAUSAL.text
    assert_close(fast(q, k, v), attention(CAUSAL, q, k, v)[0])


def test_captures_are_passed_on() -> None:
    q, k, v = inputs(BIASED)
    bias = torch.randn(4, q.shape[2], k.shape[2])
    fast = attnopt.optimize(Calls(BIASED), (q, k, v, bias))
    assert [s.status for s in fast.report.sites] == ["fused"]
    assert_close(fast(q, k, v, bias), attention(BIASED, q, k, v, [bias])[0])


def test_a_call_whose_lse_is_used_stays() -> None:
    q, k, v = inputs(BIASED)
    bias = torch.randn(4, q.shape[2], k.shape[2])
    fast = attnopt.optimize(Calls(BIASED, lse=True), (q, k, v, bias))
    (site,) = fast.report.sites
    assert site.status == "declined"
    assert "log-sum-exp is used" in site.reason
    assert_close(fast(q, k, v, bias), Calls(BIASED, lse=True)(q, k, v, bias))
