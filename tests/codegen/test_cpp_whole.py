"""Heads whose keys are one tile: every kind of row, odd heights, strides, dtypes and widths of vectors."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen import cpp
from attnopt.codegen.base import Layout, Plan
from attnopt.codegen.cpp_lists import visit_holes
from attnopt.codegen.cpp_plans import PLANS, Sizes, choose, listed
from tests.codegen.harness import agree, run
from tests.codegen.test_cpp_skeleton import tensors_of
from tests.specs import case

WHOLE = Plan(12, 64, 8, 6, "whole")
SIZES = ((1, 1, 1), (2, 49, 49), (1, 17, 64), (3, 7, 16), (1, 61, 33))


@pytest.mark.parametrize(
    "name", ["bias", "padding_causal", "sink", "gqa", "head_table", "empty_uniform", "width_40", "lse"]
)
def test_agrees_with_dense_fp64(name: str) -> None:
    for size in SIZES:
        agree(case(name).spec, tensors_of(case(name), size), case(name).scalars, plan=WHOLE)


@pytest.mark.parametrize("plan", [Plan(8, 32, 4, 4, "whole"), Plan(24, 128, 16, 3, "whole")], ids=str)
def test_other_widths_of_vectors(plan: Plan) -> None:
    for size in ((1, 5, 3), (2, 29, 32)):
        agree(case("causal").spec, tensors_of(case("causal"), size, torch.bfloat16), plan=plan)


def test_any_strides() -> None:
    q, k, v = tensors_of(case("causal"), (2, 13, 13))
    moved = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    agree(case("causal").spec, moved, plan=WHOLE)
    agree(case("causal").spec, [q, k[:, :1].expand(k.shape), v[:, :1].expand(v.shape)], plan=WHOLE)


@pytest.mark.parametrize("name", ["causal", "sink", "width_40"])
def test_a_few_keys_beyond_whole_panels(name: str) -> None:
    for n_q, n_k in ((7, 1), (20, 17), (5, 18), (34, 34), (50, 50), (11, 64)):
        tensors = tensors_of(case(name), (1, n_q, n_k))
        agree(case(name).spec, tensors, plan=WHOLE)
        agree(case(name).spec, [t.bfloat16() if i < 3 else t for i, t in enumerate(tensors)], plan=WHOLE)


def test_memory_beyond_the_last_key_never_leaks() -> None:
    for n_k in (1, 7, 49):
        q, k, v, bias = tensors_of(case("bias"), (1, 20, n_k))
        wide = torch.full([*bias.shape[:-1], n_k + 8], torch.nan)
        wide[..., :n_k] = bias
        agree(case("bias").spec, [q, k, v, wide[..., :n_k]], plan=WHOLE)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_special_numbers_stay_in_their_row(value: float) -> None:
    q, k, v, bias = tensors_of(case("bias"), (1, 20, 33))
    bias[0, 3] = value
    agree(case("bias").spec, [q, k, v, bias], plan=WHOLE)


def test_threads_do_not_change_a_bit() -> None:
    tensors = tensors_of(case("gqa"), (2, 61, 49))
    once, _ = run(case("gqa").spec, tensors, plan=WHOLE, threads=1)
    for threads in (2, 3):
        assert torch.equal(run(case("gqa").spec, tensors, plan=WHOLE, threads=threads)[0], once)


def test_huge_logits_stay_exact() -> None:
    q, k, v = tensors_of(case("plain"), (1, 33, 49))
    agree(case("plain").spec, [q * 300, k * 300, v], plan=WHOLE)


def test_lists_go_by_tiles() -> None:
    assert listed(WHOLE).form == "tile"
    assert visit_holes(listed(WHOLE)) != visit_holes(WHOLE)


def test_which_sizes_have_one_tile() -> None:
    spec = case("bias").spec
    assert [choose(spec, Sizes(1, 49, n), 8).block_k for n in (49, 64, 65, 128)] == [64, 64, 128, 128]
    assert choose(spec, Sizes(1, 49, 129), 8).form == "tile"


@pytest.mark.parametrize("row", [row for row in PLANS if row.name.startswith("whole")], ids=lambda row: row.name)
def test_every_height_of_a_block_is_there(row: object) -> None:
    text = cpp.emit(case("plain").spec, Layout("float32"), row.make(16)).source  # type: ignore[attr-defined]
    assert all(f"row_block<{n}>" in text for n in range(1, 1 + row.make(16).rows))  # type: ignore[attr-defined]
