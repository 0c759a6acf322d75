from __future__ import annotations

import pytest

from attnopt.coverage.shrink import shrink

transformers = pytest.importorskip("transformers")


def _small(model_type: str) -> object:
    return shrink(transformers.CONFIG_MAPPING[model_type]())


def test_widths_heads_and_layers_are_small() -> None:
    config = _small("llama")
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 2)
    assert config.num_key_value_heads == 4, "as many as queries, since Llama's default has no groups"
    assert _small("mistral").num_key_value_heads == 2


def test_one_layer_of_every_kind_remains() -> None:
    kinds = _small("gemma3_text").layer_types
    assert sorted(kinds) == ["full_attention", "sliding_attention"]


def test_configurations_inside_are_small_too() -> None:
    config = _small("llava")
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 64


def test_special_tokens_fit_the_vocabulary_and_equal_ones_stay_equal() -> None:
    config = _small("qwen2_vl")
    tokens = {n: getattr(config, n) for n in ("image_token_id", "video_token_id", "vision_start_token_id")}
    assert all(t < config.text_config.vocab_size for t in tokens.values())
    assert len(set(tokens.values())) == 3


def test_the_given_configuration_is_not_changed() -> None:
    config = transformers.CONFIG_MAPPING["bert"]()
    shrink(config)
    assert config.hidden_size == 768
