from __future__ import annotations

import pytest

from attnopt.coverage.rules import cap, scale

ROWS = (
    ("num_hidden_layers", 32, 2),
    ("encoder_layers", 12, 2),
    ("hidden_size", 4096, 64),
    ("text_hidden_size", 768, 64),
    ("intermediate_size", 11008, 64),
    ("num_attention_heads", 32, 4),
    ("qk_rope_head_dim", 64, 8),
    ("head_dim", 128, 16),
    ("vocab_size", 151936, 256),
    ("num_experts_per_tok", 8, 2),
    ("sliding_window", 4096, 8),
    ("image_size", 224, 32),
    ("patch_size", 16, 8),
    ("num_channels", 3, 3),
    ("num_feat_extract_layers", 7, 7),
    ("unheard_of", 1000, 1000),
)


@pytest.mark.parametrize(("name", "value", "small"), ROWS)
def test_numbers_are_capped_by_their_name(name: str, value: int, small: int) -> None:
    assert cap(name, value, 0) == small


@pytest.mark.parametrize("name", [row[0] for row in ROWS])
def test_nothing_is_ever_raised(name: str) -> None:
    assert cap(name, 1, 0) <= 1


def test_the_second_attempt_leaves_widths_alone() -> None:
    assert cap("hidden_size", 4096, 1) == 4096
    assert cap("num_hidden_layers", 32, 1) == 2


def test_lists_of_widths_keep_their_ratios() -> None:
    assert scale("hidden_sizes", [96, 192, 384, 768], 0) == [32, 64, 128, 256]
    assert scale("hidden_sizes", [96, 192], 1) == [96, 192]
    assert scale("strides", [4, 2], 0) == [4, 2]
