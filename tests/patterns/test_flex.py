"""`flex_attention`: what is declined. What is read stands in `tests/spellings/flex.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from attnopt.errors import Decline
from attnopt.patterns import find
from tests.modules import captured
from tests.spellings.flex import CAUSAL
from tests.spellings.row import HEADS

INPUTS = tuple(torch.randn(shape) for shape in HEADS)


def test_a_log_sum_exp_that_is_used_is_no_gain() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flex_attention(q, k, v, block_mask=CAUSAL, return_lse=True)  # type: ignore[return-value]

    ((_, pattern, found),) = find(captured(run, *INPUTS).gm.graph)
    assert pattern == "flex"
    assert isinstance(found, Decline)
    assert "log-sum-exp" in found.reason


def test_a_score_function_under_dynamo() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask=CAUSAL)

    compiled = torch.compile(run, backend="attnopt", options={"kernel": "reference"})
    torch.testing.assert_close(compiled(*INPUTS), run(*INPUTS))
