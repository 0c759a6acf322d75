"""Gradients of every spec of the list by the C++ kernel, and cases that have broken such kernels elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.codegen import cpp
from attnopt.codegen.base import Plan
from attnopt.codegen.cpp_backward import emit_backward
from attnopt.codegen.cpp_loads import k_axes
from attnopt.codegen.cpp_plans import backward_plan
from attnopt.options import Options
from attnopt.runtime.build import build_kernel
from attnopt.runtime.compile import vector_lanes
from attnopt.runtime.cpp_gradient import Gradients, objection
from attnopt.runtime.gradient import expected
from attnopt.runtime.native import layout_of
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, Heads, Softmax
from tests.conformance.judge import tensors
from tests.specs import CASES, Case, Sizes, case

# What has no kernel, and a word of the reason.
REFUSED = {
    "head_table": "head map", "gate": "whole row", "gate_per_row": "whole row", "squared_relu": "divisor",
    "softplus": "divisor", "linear": "divisor", "linear_absolute": "divisor", "pointwise_gated": "divisor",
    "routed": "every query", "routed_groups": "every query", "routed_halves": "every query",
}  # fmt: skip
SHAPES = ((2, 9, 11, "sliced"), (2, 101, 129, "transposed"), (1, 49, 200, "broadcast"))


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """Code for every spec is compiled here; how fast it runs is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-O0"))
        yield


def inputs_of(
    item: Case, batch: int, n_q: int, n_k: int, layout: str, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> list[Tensor]:
    captures = item.captures(Sizes(batch, item.spec.heads.q, n_q, n_k), torch.Generator().manual_seed(1))
    return [*tensors(item.spec, batch, n_q, n_k, layout, dtype, size), *captures]


def kernel_of(item: Case, given: list[Tensor], options: Options, needs: list[bool] | None = None) -> Gradients:
    needs = needs or [t.is_floating_point() for t in given]
    learned = tuple(c.name for c, needed in zip(item.spec.captures, needs[3:], strict=True) if needed)
    layout = layout_of(k_axes(item.spec), given[0], given[3:])
    return Gradients(item.spec, layout, learned, options, pytest.fail)


def found_by(
    kernel: Gradients, item: Case, given: list[Tensor], with_lse: bool = True
) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
    """Gradients of the result and of lse, drawn, and those that the kernel makes of them."""
    generator = torch.Generator().manual_seed(2)
    out, lse = reference(item.spec, *given[:3], given[3:], item.scalars)
    # As a view with other strides, as gradients are.
    grad = torch.randn((*out.shape[:2], out.shape[3], out.shape[2]), generator=generator).to(out.dtype).transpose(2, 3)
    softmax = isinstance(item.spec.normalizer, Softmax)
    dlse = torch.randn(lse.shape, generator=generator).where(lse.isfinite(), 0.0) if softmax and with_lse else None
    saved = (out, lse.float().contiguous()) if softmax else (None, None)
    return grad, dlse, kernel.run(grad, dlse, given, item.scalars, saved)


def agree(item: Case, given: list[Tensor], options: Options, with_lse: bool = True) -> None:
    needs = [t.is_floating_point() for t in given]
    kernel = kernel_of(item, given, options)
    assert not kernel.refused, kernel.refused
    assert not kernel.problem, kernel.problem
    grad, dlse, found = found_by(kernel, item, given, with_lse)
    problem = objection(item.spec, grad, dlse, given, item.scalars, needs, found)
    assert not problem, f"{item} {[tuple(t.shape) for t in given]}: {problem}"


@pytest.mark.parametrize("item", [c for c in CASES if c.name not in REFUSED], ids=str)
def test_every_spec(item: Case, options: Options) -> None:
    for batch, n_q, n_k, layout in SHAPES:
        agree(item, inputs_of(item, batch, n_q, n_k, layout), options)


@pytest.mark.parametrize("item", [c for c in CASES if c.name in REFUSED], ids=str)
def test_what_has_no_kernel_says_why(item: Case, options: Options) -> None:
    assert REFUSED[item.name] in kernel_of(item, inputs_of(item, 1, 3, 3, "contiguous"), options).refused


@pytest.mark.parametrize("name", ["gate", "gate_per_row"])
def test_a_gate_that_is_not_learned(name: str, options: Options) -> None:
    item = case(name)
    given, needs = inputs_of(item, 2, 30, 40, "contiguous"), [True, True, True, False]
    grad, dlse, found = found_by(kernel_of(item, given, options, needs), item, given)
    assert not objection(item.spec, grad, dlse, given, item.scalars, needs, found)


CAUSAL = case("causal")
ODD = [
    Case(f"d_{d}", replace(CAUSAL.spec, heads=Heads(2, 1, 1, d, d + 8), score=ex.s / 7, keep=sp.true)) for d in (1, 130)
]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 97), (1, 97, 1), (3, 95, 97)], ids=str)
def test_odd_lengths(sizes: tuple[int, int, int], options: Options) -> None:
    agree(CAUSAL, inputs_of(CAUSAL, *sizes, "contiguous"), options)


@pytest.mark.parametrize("item", ODD, ids=str)
def test_odd_widths(item: Case, options: Options) -> None:
    agree(item, inputs_of(item, 1, 20, 30, "contiguous"), options)


@pytest.mark.parametrize("group", [3, 5])
def test_groups(group: int, options: Options) -> None:
    heads = Heads(2 * group, 2, 2, 16, 16)
    item = Case("group", AttentionSpec(heads, score=ex.s / 4, keep=ex.k <= ex.q))
    agree(item, inputs_of(item, 2, 100, 100, "transposed"), options)


@pytest.mark.parametrize("name", ["causal", "sink"])
def test_huge_logits(name: str, options: Options) -> None:
    # Beside logits of thousands lse has few decimals, and so has what its own gradient is shared out by.
    agree(case(name), inputs_of(case(name), 1, 17, 110, "contiguous", size=30.0), options, with_lse=False)


def test_weights_have_the_digits_of_lse_where_a_row_has_keys_in_two_tiles(options: Options) -> None:
    item = case("plain")
    given = inputs_of(item, 1, 17, 110, "contiguous", size=30.0)
    grad, dlse, found = found_by(kernel_of(item, given, options), item, given, with_lse=False)
    golden = expected(item.spec, grad, dlse, given, (), [True] * 3, torch.float64)[2]
    lse = reference(item.spec, *given)[1]
    # A weight of one errs by the roundings of a logit and of lse; at most all 17 rows meet in one value.
    bound = 17 * 4 * torch.finfo(torch.float32).eps * float(lse.abs().max()) * float(grad.abs().max())
    assert float((found[2] - golden).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "gqa"])
def test_half_precision(name: str, dtype: torch.dtype, options: Options) -> None:
    agree(case(name), inputs_of(case(name), 1, 100, 110, "transposed", dtype), options)


@pytest.mark.parametrize("name", ["bias", "buckets", "gqa"])
def test_threads_share_the_work_and_give_the_same_each_time(name: str, options: Options) -> None:
    item = case(name)
    given = inputs_of(item, 1, 120, 300, "contiguous")
    kernel, needs = kernel_of(item, given, options), [t.is_floating_point() for t in given]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 4):
            torch.set_num_threads(threads)
            grad, dlse, found = found_by(kernel, item, given)
            again = found_by(kernel, item, given)[2]
            assert all(torch.equal(found[place], again[place]) for place in found)
            problem = objection(item.spec, grad, dlse, given, item.scalars, needs, found)
            assert not problem, f"{threads} threads: {problem}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("name", ["causal", "wide_values", "buckets"])
def test_other_widths_of_vectors(name: str, lanes: int, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.runtime.cpp_gradient.vector_lanes", lambda: lanes)
    agree(case(name), inputs_of(case(name), 1, 101, 130, "contiguous"), options)


# What is broken, the case it is broken in, the text of the kernel, what it becomes.
MUTATIONS = (
    ("forgets delta", "causal", "p * (dp - row.delta)", "p * dp"),
    ("drops the slope", "softcap", "store(y + j, select(kept, dlogit * ", "store(y + j, select(kept, dlogit + 0.0f * "),
    ("adds no second tile of queries", "scale", "store(o, load(o) + sum[r][i]);", "store(o, sum[r][i]);"),
    ("drops the scale of queries", "scale", "int(rows), kScale, a.dq", "int(rows), 1.0f, a.dq"),
    ("reads another key head", "gqa", "{ return h / 4; }", "{ return h % 2; }"),
    ("causal is off by one", "causal", "splat_i(q) >= k", "splat_i(q) > k"),
    ("forgets the sink's share", "sink", "-= expf(", "+= expf("),
    ("counts a bucket twice", "buckets", "+= sum_lanes(part0)", "+= 2 * sum_lanes(part0)"),
    ("gives uniform rows to no value", "empty_uniform", "+= t.uniform[c + d]", "+= 0.0f"),
)


@pytest.mark.parametrize(("what", "name", "right", "wrong"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_a_broken_kernel_is_refused_at_first_use(
    what: str, name: str, right: str, wrong: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = case(name)
    given = inputs_of(item, 2, 120, 130, "contiguous")
    kernel, needs = (
        kernel_of(item, given, replace(options, first_use_check=True)),
        [x.is_floating_point() for x in given],
    )
    grad = torch.randn(2, item.spec.heads.q, 120, item.spec.heads.d_v, generator=torch.Generator().manual_seed(3))
    arguments = (grad, None, given, item.scalars, needs)
    assert kernel.trusted(*arguments) == ""
    text = emit_backward(item.spec, kernel.layout, backward_plan(vector_lanes()), kernel.learned)
    assert right in text.source, f"{what}: the kernel no longer contains {right!r}"
    broken = replace(text, source=text.source.replace(right, wrong))
    kernel.library, kernel.checked = build_kernel(broken, options, pytest.fail, entry="backward"), set()
    assert "disagrees with the reference" in kernel.trusted(*arguments)


def test_the_plan_of_the_backward_has_its_own_form() -> None:
    assert backward_plan(8) == Plan(96, 96, 8, 6, "backward")
