"""The limit of Dynamo's recompilations is said once, in the report and in the log."""

from __future__ import annotations

import logging

import pytest
import torch

import attnopt
from attnopt import recompiles
from tests.modules import Function


def _broken(x: torch.Tensor, times: int) -> torch.Tensor:
    y = (x @ x.mT).softmax(-1) @ x
    if y.sum().item() > 1e9:  # no graph holds this
        y = y + 1
    return y * times


def test_it_is_in_the_report_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    fast = attnopt.optimize(Function(_broken), (x, 2), options={"kernel": "reference"})
    recompiles._listener.heard.clear()
    with torch._dynamo.config.patch(recompile_limit=1), caplog.at_level(logging.WARNING, "attnopt"):
        for dtype in (torch.float64, torch.float16, torch.float64):
            y = x.to(dtype)
            torch.testing.assert_close(fast(y, 2), _broken(y, 2))
    (note,) = [n for n in fast.report.notes if "recompile_limit" in n]
    assert "recompile_limit of 1" in note
    assert len([r for r in caplog.records if r.getMessage() == note]) == 1


def test_other_messages_are_none_of_its_business() -> None:
    told: list[str] = []
    with recompiles.telling(told.append):
        logging.getLogger("torch._dynamo.convert_frame").warning("something else %s", 1)
    assert told == []
