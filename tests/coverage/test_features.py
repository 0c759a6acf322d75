from __future__ import annotations

import pytest

from attnopt.coverage.build import build
from attnopt.coverage.features import SPECIAL, find_config, read, setting

transformers = pytest.importorskip("transformers")


def test_the_nearest_configuration_with_an_attribute_is_found() -> None:
    config = transformers.CONFIG_MAPPING["clip"]()
    assert find_config(config, "patch_size") is config.vision_config
    assert find_config(config, "no_such_attribute") is None


def test_the_first_attribute_with_a_value_counts() -> None:
    config = transformers.CONFIG_MAPPING["gpt2"]()
    assert setting(config, "absent", "n_embd") == 768
    assert setting(config, "absent") is None


def test_an_attribute_that_differs_by_layer_reads_as_none() -> None:
    class Config:
        @property
        def head_dim(self) -> int:
            raise ValueError("it differs")

    assert read(Config(), "head_dim") is None


@pytest.mark.parametrize("model_type", ["time_series_transformer", "patchtst", "decision_transformer"])
def test_special_inputs_are_accepted(model_type: str) -> None:
    assert model_type in SPECIAL
    assert build(model_type).inputs
