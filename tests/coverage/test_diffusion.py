from __future__ import annotations

import pytest
import torch

from attnopt.coverage import diffusion

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", diffusion.names())
def test_every_row_runs(name: str) -> None:
    model, inputs = diffusion.make(name, "sdpa")
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    assert out.isfinite().all()
    assert sum(p.numel() for p in model.parameters()) < 2_000_000


def test_plain_attentions_can_be_written_out() -> None:
    model, _ = diffusion.make("diffusers:UNet2DConditionModel", "eager")
    assert {type(p).__name__ for p in model.attn_processors.values()} == {"AttnProcessor"}


def test_a_model_with_one_implementation_says_so() -> None:
    with pytest.raises(LookupError, match="one implementation"):
        diffusion.make("diffusers:FluxTransformer2DModel", "eager")
