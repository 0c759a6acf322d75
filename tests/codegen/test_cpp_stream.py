"""The streaming form: every case that has one key head for keys and values, splits of keys, strides, vector widths."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.base import Plan
from tests.codegen.harness import agree, run
from tests.codegen.test_cpp_skeleton import tensors_of
from tests.specs import case

STREAM = Plan(16, 64, 8, 8, "stream")
SIZES = ((1, 1, 1), (2, 1, 70), (1, 3, 200), (2, 5, 33), (1, 21, 40))
# What differs from the tiled form; the conformance suite runs every case at lengths that stream.
NAMES = ("causal_bottom_right", "padding", "window_per_head", "bias", "gqa_group_of_three", "narrow_values",
         "empty_uniform", "signed", "decay", "gate_per_row")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_case_agrees_with_dense_fp64(name: str) -> None:
    item = case(name)
    for size in SIZES:
        agree(item.spec, tensors_of(item, size), item.scalars, plan=STREAM)


@pytest.mark.parametrize(
    "plan", [Plan(4, 16, 4, 4, "stream"), Plan(16, 32, 16, 8, "stream"), Plan(3, 24, 8, 2, "stream")], ids=str
)
@pytest.mark.parametrize("name", ["gqa_group_of_two", "width_40", "linear"])
def test_any_plan_agrees(name: str, plan: Plan) -> None:
    for size in SIZES[1:]:
        agree(case(name).spec, tensors_of(case(name), size), plan=plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_half_precision(dtype: torch.dtype, lanes: int) -> None:
    for name in ("gqa", "width_40"):
        agree(case(name).spec, tensors_of(case(name), (2, 2, 131), dtype), plan=Plan(8, 32, lanes, 4, "stream"))


@pytest.mark.parametrize(
    "name", ["gqa_group_of_two", "padding", "empty_uniform", "linear", "weight_of_score", "squared_relu"]
)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_parts_of_the_keys_meet(name: str, threads: int) -> None:
    """More keys than one part has: with several threads they are split and merged, the same way every time."""
    item = case(name)
    tensors = tensors_of(item, (1, 2, 2100))
    agree(item.spec, tensors, item.scalars, plan=STREAM, threads=threads)
    first, again = (run(item.spec, tensors, item.scalars, STREAM, threads)[0] for _ in range(2))
    assert torch.equal(first.nan_to_num(), again.nan_to_num())


@pytest.mark.parametrize("way", ["heads last", "gaps", "width first"])
def test_any_strides(way: str) -> None:
    item = case("gqa")
    q, k, v = tensors_of(item, (2, 2, 150))
    if way == "gaps":
        wide = [torch.full([*t.shape[:3], 2 * t.shape[3]], torch.nan) for t in (k, v)]
        for made, t in zip(wide, (k, v), strict=True):
            made[..., ::2] = t
        k, v = (made[..., ::2] for made in wide)
    else:
        a, b = (1, 2) if way == "heads last" else (2, 3)
        k, v = (t.transpose(a, b).contiguous().transpose(a, b) for t in (k, v))
    agree(item.spec, [q, k, v], plan=STREAM)


def test_memory_beyond_the_last_key_never_leaks() -> None:
    item = case("gqa")
    for n_k in (1, 7, 65, 130):
        q, k, v = tensors_of(item, (1, 1, n_k))
        held = []
        for t in (k, v):
            wide = torch.full([*t.shape[:2], n_k + 80, t.shape[3]], torch.nan)
            wide[:, :, 40:-40] = t
            held.append(wide[:, :, 40:-40])
        agree(item.spec, [q, *held], plan=STREAM)
