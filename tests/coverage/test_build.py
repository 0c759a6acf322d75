from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.coverage.build import BuildError, build, one_line, scatter

pytest.importorskip("transformers")


@pytest.mark.parametrize("model_type", ["llama", "bert", "vit", "wav2vec2"])
def test_what_is_built_runs_and_is_small(model_type: str) -> None:
    built = build(model_type)
    assert not built.model.training
    assert sum(p.numel() for p in built.model.parameters()) < 2_000_000
    with torch.no_grad():
        assert built.model(**built.inputs)[0].isfinite().all()


def test_the_attention_asked_for_is_used() -> None:
    assert build("llama", "sdpa").model.config._attn_implementation == "sdpa"
    assert build("llama").model.config._attn_implementation == "eager"


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(BuildError, match="no model"):
        build("layoutxlm")


def test_no_parameter_is_constant_after_scattering() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    nn.init.zeros_(model[0].weight)
    scatter(model)
    assert all(p.std() > 0 for p in model.parameters())


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("first\n  second")) == "ValueError: first second"
    assert one_line(KeyError()) == "KeyError"
