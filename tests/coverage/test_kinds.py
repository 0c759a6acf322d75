from __future__ import annotations

import pytest

from attnopt.coverage.kinds import kind
from tests.coverage.rows import site


@pytest.mark.parametrize(
    ("more", "variant", "words"),
    [
        ({}, "eager", "self, causal, padding"),
        (
            {"spec": "4/2 heads, d=16; score s; keep k <= q and q <= k + 7"},
            "sdpa",
            "self, causal, window, grouped heads",
        ),
        ({"spec": "4 heads, d=16; score s; keep k <= q + 8 and q <= k + 8"}, "eager", "self, window"),
        ({"spec": "4 heads, d=16; score s; keep k <= q + 9", "lengths": (4, 13)}, "decode", "decode, causal"),
        ({"spec": "4/1 heads, d=16; score s + bias[h, k - q + 12]"}, "eager", "self, bias, one key head"),
        ({"spec": "4 heads, d=16; score s", "lengths": (7, 13)}, "eager", "cross"),
        ({"spec": "4 heads, d=16; score 50*tanh(s/800)", "lengths": (1, 14)}, "decode", "decode, soft-cap"),
        ({"spec": "4 heads, d=16; score s", "lengths": None, "form": "linear"}, "eager", "linear, self"),
    ],
)
def test_a_site_in_a_few_words(more: dict[str, object], variant: str, words: str) -> None:
    assert kind(site(**more), variant) == words
