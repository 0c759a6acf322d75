from __future__ import annotations

import pytest

from attnopt.coverage.variants import BuildError, NotApplicable, variant

pytest.importorskip("transformers")


def test_each_variant_of_a_decoder() -> None:
    assert type(variant("llama", "eager")[0]).__name__ == "LlamaForCausalLM"
    assert variant("llama", "sdpa")[0].config._attn_implementation == "sdpa"
    assert type(variant("llama", "decode")[0]).__name__ == "DecodeStep"
    assert "cache" in variant("llama", "decode-static")[1]


@pytest.mark.parametrize(
    ("name", "which", "why"),
    [
        ("vit", "decode", "keeps no cache"),
        ("bert", "decode-static", "keeps no cache"),
        ("layoutxlm", "eager", "no model"),
    ],
)
def test_what_there_is_not_says_why(name: str, which: str, why: str) -> None:
    with pytest.raises((NotApplicable, BuildError), match=why):
        variant(name, which)
