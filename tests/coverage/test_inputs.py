from __future__ import annotations

import pytest
import torch

from attnopt.coverage.build import build
from attnopt.coverage.inputs import BATCH, TARGETS, TOKENS, reduced

pytest.importorskip("transformers")


def test_a_decoder_is_padded_on_the_left_and_an_encoder_on_the_right() -> None:
    decoder, encoder = build("llama").inputs, build("bert").inputs
    assert decoder["input_ids"].shape == encoder["input_ids"].shape == (BATCH, TOKENS)
    assert decoder["attention_mask"][1].tolist() == sorted(decoder["attention_mask"][1].tolist())
    assert encoder["attention_mask"][1].tolist() == sorted(encoder["attention_mask"][1].tolist(), reverse=True)
    for given in (decoder, encoder):
        assert given["attention_mask"][0].all()
        assert 0 < given["attention_mask"][1].sum() < TOKENS


def test_an_encoder_decoder_gets_both_texts() -> None:
    given = build("t5").inputs
    assert given["decoder_input_ids"].shape == (BATCH, TARGETS)
    assert given["input_ids"].shape == (BATCH, TOKENS)


def test_inputs_are_the_same_every_time() -> None:
    first, again = build("vit").inputs, build("vit").inputs
    assert torch.equal(first["pixel_values"], again["pixel_values"])


def test_the_message_of_a_mismatch_says_how_many_image_tokens_are_needed() -> None:
    class Config:
        image_token_id = 200

    given = {"input_ids": torch.arange(26).view(2, 13), "pixel_values": torch.zeros(2, 3, 8, 8)}
    error = ValueError("Image features and image tokens do not match: tokens: 0, features: 8")
    longer = reduced(given, error, None, Config())[0]
    assert (longer["input_ids"] == 200).sum() == 8
    assert "pixel_values" in longer
