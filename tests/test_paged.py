"""The door for serving engines: results, and one error for every misuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attnopt import paged
from attnopt.errors import OptionError, ShapeError
from attnopt.runtime.op import attention
from tests.conformance.judge import tensors
from tests.conformance.paged_inputs import paged as in_pages
from tests.runtime.test_pages import LAST


def given(**other: Any) -> tuple[Any, ...]:
    made = in_pages(tensors(LAST, 2, 1, 20, "contiguous", torch.float32, 1.0), (20, 9), 8)
    names = ("q", "keys", "values", "page_table", "key_lengths")
    return tuple(other.get(name, getattr(made, name)) for name in names)


def test_it_is_the_attention_over_each_entry() -> None:
    q, k, v = tensors(LAST, 2, 1, 20, "contiguous", torch.float32, 1.0)
    out, lse = paged.attention(LAST, *given())
    for i, n in ((0, 20), (1, 9)):
        own, own_lse = attention(LAST, q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n])
        torch.testing.assert_close(out[i : i + 1], own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[i : i + 1], own_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"q": torch.zeros(2, 3, 1, 16)}, r"q must have the shape \[any, 4, any, 16\]; it is \[2, 3, 1, 16\]"),
        ({"keys": torch.zeros(4, 2, 8, 16)}, r"keys must have the shape \[any, any, 2, 16\]"),
        ({"values": torch.zeros(4, 8, 2, 8)}, r"values must have the shape \[7, 8, 2, 8\]; it is \[4, 8, 2, 8\]"),
        ({"page_table": torch.zeros(3, 4, dtype=torch.int32)}, r"page_table must have the shape \[2, any\]"),
        ({"key_lengths": torch.zeros(2, 1, dtype=torch.int32)}, r"key_lengths must have the shape \[2\]"),
        ({"page_table": torch.zeros(2, 4, dtype=torch.int64)}, "must be int32; they are int64, int32"),
        ({"q": torch.zeros(2, 4, 1, 16, dtype=torch.float16)}, "one floating dtype; they are float16, float32"),
        ({"keys": torch.zeros(6, 0, 2, 16), "values": torch.zeros(6, 0, 2, 8)}, "at least one key"),
        ({"key_lengths": torch.tensor([20, 99], dtype=torch.int32)}, "entry 1 has 99 keys"),
        ({"page_table": torch.full((2, 4), 7, dtype=torch.int32)}, "names the pages 7 to 7"),
        ({"q": torch.zeros(2, 4, 1, 16, device="meta")}, "on one device; they are on cpu, meta"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_inputs_that_do_not_fit_are_one_error(other: dict[str, Any], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        paged.attention(LAST, *given(**other))


def test_new_keys_are_taken_or_refused() -> None:
    new = torch.zeros(2, 3, 2, 16), torch.zeros(2, 3, 2, 8)
    out, _ = paged.attention(LAST, *given(), new_keys=new[0], new_values=new[1])
    assert out.shape == (2, 4, 1, 8)
    with pytest.raises(OptionError, match="come together"):
        paged.attention(LAST, *given(), new_keys=new[0])
    with pytest.raises(ShapeError, match=r"new_values must have the shape \[2, 3, 2, 8\]; it is \[2, 2, 2, 8\]"):
        paged.attention(LAST, *given(), new_keys=new[0], new_values=new[1][:, 1:])


def test_captures_and_scalars_are_counted() -> None:
    with pytest.raises(ShapeError, match=r"takes the captures \[\] and the scalars \[\]; 1 and 0 were given"):
        paged.attention(LAST, *given(), captures=[torch.zeros(1)])


def test_what_has_no_paged_form_is_refused() -> None:
    with pytest.raises(OptionError, match="it has dropout"):
        paged.attention(replace(LAST, dropout=0.1), *given())
    q = given()[0].requires_grad_()
    with pytest.raises(OptionError, match="no gradients"):
        paged.attention(LAST, *given(q=q))
    with torch.no_grad():
        assert paged.attention(LAST, *given(q=q))[0].shape == (2, 4, 1, 8)


def test_a_spec_is_needed() -> None:
    with pytest.raises(OptionError, match="an AttentionSpec says what to compute; it is a str"):
        paged.attention("dense", *given())  # type: ignore[arg-type]
