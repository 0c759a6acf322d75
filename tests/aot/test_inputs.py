"""The tensors of the usual attentions fit their specs."""

from __future__ import annotations

import pytest
import torch

from attnopt.aot.inputs import usual_inputs
from attnopt.aot.standard import standard
from attnopt.runtime.inputs import check_inputs
from attnopt.runtime.reference import reference
from attnopt.spec import Heads

USUAL = dict(standard(Heads(4, 2, 2, 8, 8)))


@pytest.mark.parametrize("name", USUAL)
def test_inputs_fit_and_attend(name: str) -> None:
    spec = USUAL[name]
    q, k, v, *captures = usual_inputs(spec, 2, 5, 7, torch.float32, "cpu")
    check_inputs(spec, q, k, v, captures, ())
    out, _ = reference(spec, q, k, v, captures, ())
    assert out.shape == (2, 4, 5, 8)
    assert bool(out.isfinite().all())


def test_documents_have_a_thousand_tokens() -> None:
    doc = usual_inputs(USUAL["documents"], 1, 3000, 3000, torch.float32, "cpu")[3]
    assert torch.bincount(doc[0]).tolist() == [1024, 1024, 952]
