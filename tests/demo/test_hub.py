"""Models by type alone: few layers, inputs that fit, clear refusals."""

from __future__ import annotations

import pytest
import torch

from attnopt.demo.hub import from_config
from attnopt.errors import OptionError

pytest.importorskip("transformers")


@pytest.mark.parametrize(("kind", "layers"), [("distilbert", 1), ("vit", 2)])
def test_a_model_by_type_runs_on_its_inputs(kind: str, layers: int) -> None:
    model, args, kwargs = from_config(kind, layers, 16)
    assert not model.training
    assert model.config.num_hidden_layers == layers
    with torch.no_grad():
        assert model(*args, **kwargs).last_hidden_state.isfinite().all()


def test_tokens_stay_within_the_positions() -> None:
    _, _, kwargs = from_config("distilbert", 1, 100_000)
    assert kwargs["input_ids"].shape == (1, 512)


def test_an_unknown_type_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="knows no model type 'nope'"):
        from_config("nope", 1, 16)


def test_other_inputs_are_an_option_error() -> None:
    with pytest.raises(OptionError, match="'input_values'; write a function"):
        from_config("wav2vec2", 1, 16)
