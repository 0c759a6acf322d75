from __future__ import annotations

import pytest

from attnopt.coverage.catalogue import architectures, model_class, model_types

pytest.importorskip("transformers")


def test_every_model_type_is_an_architecture() -> None:
    assert set(model_types()) <= set(architectures())
    assert len(set(architectures())) == len(architectures()) >= 250


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertModel"),
        ("t5", "T5Model"),
        ("siglip_vision_model", "SiglipVisionModel"),
    ],
)
def test_decoders_stand_as_language_models_and_the_rest_as_base_models(model_type: str, name: str) -> None:
    assert model_class(model_type).__name__ == name


def test_a_configuration_without_a_model_is_said_so() -> None:
    with pytest.raises(LookupError, match="no model"):
        model_class("layoutxlm")
