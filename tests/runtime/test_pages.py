"""The definition of attention over pages: entry by entry, what the usual attention makes of its own keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.errors import ShapeError
from attnopt.expr import b, k, n_k, n_q, q, s
from attnopt.runtime.pages import entries, gathered
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads
from tests.conformance.judge import tensors
from tests.conformance.paged_inputs import paged

HEADS = Heads(4, 2, 2, 16, 8)
LAST = AttentionSpec(HEADS, score=s / 4, keep=k <= q + n_k - n_q, returns=("lse",))
PAD = Capture("pad", "int", (None, None))
PADDED = AttentionSpec(
    HEADS, score=s / 4, keep=sp.Ne(ex.load("pad", b, k, integer=True), 0), captures=(PAD,), empty_row=EmptyRow.NAN
)
LENGTHS = (23, 0, 7, 16)


@pytest.mark.parametrize("page", [1, 5, 16])
def test_each_entry_is_the_attention_over_its_own_keys(page: int) -> None:
    q_, k_, v_ = tensors(LAST, 4, 3, 23, "contiguous", torch.float32, 1.0)
    out, lse = gathered(LAST, paged((q_, k_, v_), LENGTHS, page))
    for i, n in enumerate(LENGTHS):
        own = reference(LAST, q_[i : i + 1], k_[i : i + 1, :, :n], v_[i : i + 1, :, :n])
        torch.testing.assert_close(out[i : i + 1], own[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[i : i + 1], own[1], rtol=1e-5, atol=1e-6)
    assert bool((out[1] == 0).all())


def test_what_depends_on_the_entry_sees_the_whole_batch() -> None:
    inputs = tensors(PADDED, 4, 2, 23, "contiguous", torch.float32, 1.0)
    pad = torch.randint(0, 2, (4, 23), generator=torch.Generator().manual_seed(0))
    pad[:, 0] = torch.tensor([1, 1, 0, 1])
    pad[2] = 0
    out, lse = gathered(PADDED, paged(inputs, LENGTHS, 4, [pad]))
    assert lse.numel() == 0
    kept = pad.clone()
    for i, n in enumerate(LENGTHS):
        kept[i, n:] = 0
    wanted = reference(PADDED, *inputs, [kept])[0]
    torch.testing.assert_close(out[[0, 3]], wanted[[0, 3]], rtol=1e-5, atol=1e-6)
    assert bool(out[2].isnan().all())  # keys, none of them kept
    assert bool((out[1] == 0).all())  # no keys


def test_lengths_and_pages_out_of_range_are_errors() -> None:
    inputs = tensors(LAST, 2, 1, 10, "contiguous", torch.float32, 1.0)
    given = paged(inputs, (10, 3), 4)
    assert given.room == 16
    with pytest.raises(ShapeError, match=r"entry 0 has 17 keys; a page table of 4 pages of 4 has room for 0 to 16"):
        list(entries(replace(given, key_lengths=torch.tensor([17, 0], dtype=torch.int32))))
    with pytest.raises(ShapeError, match=r"entry 1 names the pages -1 to .*; the pool has those from 0 to 5"):
        list(entries(replace(given, key_lengths=torch.tensor([0, 9], dtype=torch.int32))))


def test_new_keys_follow() -> None:
    q_, k_, v_ = tensors(LAST, 3, 2, 23, "contiguous", torch.float32, 1.0)
    given = paged((q_, k_, v_), (20, 0, 7), 8, n_new=3)
    assert given.lengths == [23, 3, 10]
    assert (given.n_new, given.room) == (3, 4 * 8 + 3)
    out, _ = gathered(LAST, given)
    for i, n in enumerate(given.lengths):
        own = reference(LAST, q_[i : i + 1], k_[i : i + 1, :, :n], v_[i : i + 1, :, :n])
        torch.testing.assert_close(out[i : i + 1], own[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ShapeError, match="entry 0 has 33 keys"):
        list(entries(replace(given, key_lengths=torch.tensor([33, 0, 0], dtype=torch.int32))))


def test_an_empty_batch_is_empty() -> None:
    inputs = tensors(LAST, 2, 1, 10, "contiguous", torch.float32, 1.0)
    given = paged(inputs, (10, 3), 4)
    none = replace(given, q=given.q[:0], page_table=given.page_table[:0], key_lengths=given.key_lengths[:0])
    out, _ = gathered(LAST, none)
    assert out.shape == (0, 4, 1, 8)
