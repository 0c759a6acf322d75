from __future__ import annotations

import pytest
import torch

from attnopt.coverage.build import build
from attnopt.coverage.decode import ROOM, decode, skeleton, slots
from attnopt.coverage.inputs import TOKENS

pytest.importorskip("transformers")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "t5"])
def test_the_step_is_the_last_row_of_one_longer_prefill(model_type: str, static: bool) -> None:
    built = build(model_type)
    step, inputs = decode(built, static)
    names = ("input_ids", "attention_mask") if built.causal else ("decoder_input_ids", "decoder_attention_mask")
    longer = {**built.inputs, names[0]: torch.cat([built.inputs[names[0]], inputs[names[0]]], 1)}
    if names[1] in inputs:
        longer[names[1]] = inputs[names[1]]
    with torch.no_grad():
        expected = built.model(**longer)[0][:, -1]
        found = step(**inputs)[0][:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_between_steps() -> None:
    step, inputs = decode(build("llama"), static=True)
    before = [t.clone() for t in inputs["cache"]]
    with torch.no_grad():
        first, again = step(**inputs)[0], step(**inputs)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(x, y) for x, y in zip(before, inputs["cache"], strict=True))


def test_a_static_cache_has_room_and_a_dynamic_one_grows() -> None:
    for static, length in ((True, ROOM), (False, TOKENS + 1)):
        step, inputs = decode(build("llama"), static)
        with torch.no_grad():
            cache = step(**inputs)[1]
        assert {t.shape[2] for t in cache if t.dim() == 4} == {length}


def test_a_skeleton_shares_tensors_and_no_objects() -> None:
    step, _ = decode(build("llama"), static=False)
    fresh = skeleton(step.template)
    pairs = list(zip(slots(step.template), slots(fresh), strict=True))
    assert pairs
    assert all(a is not b and getattr(a, n) is getattr(b, m) for (a, n), (b, m) in pairs)


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(AttributeError, match="past_key_values"):
        decode(build("vit"), static=False)
