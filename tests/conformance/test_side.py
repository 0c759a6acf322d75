"""Column mass and weights of the list by C++ kernels, against fp64; and all side outputs of one call, poisoned."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from attnopt.analysis.plain import weights_of
from attnopt.codegen.cpp_loads import k_axes
from attnopt.observed import attention
from attnopt.options import Options
from attnopt.runtime.cpp_side import CppSide
from attnopt.runtime.native import layout_of
from attnopt.runtime.pairs import defined
from attnopt.runtime.reference import reference
from attnopt.runtime.side_kernels import Trusted
from attnopt.runtime.validate import compare
from tests.conformance.judge import LAYOUTS, tensors
from tests.specs import CASES, OBSERVED, Sizes, case

# The others differ in what comes after the weights, or in another number; `ATTNOPT_TEST_ALL` runs every case.
SOME = (
    "bias", "guarded", "head_table", "relu", "entropy_sink", "entropy_zero", "entropy_absorbed", "entropy_routed",
)  # fmt: skip
NAMES = [c.name for c in (*CASES, *OBSERVED)] if os.environ.get("ATTNOPT_TEST_ALL") else SOME


def judge(name: str, dtype: torch.dtype, sizes: tuple[int, int, int], layout: str, options: Options) -> None:
    item, (batch, n_q, n_k) = case(name), sizes
    q, k, _ = tensors(item.spec, batch, n_q, n_k, layout, dtype, 1.0)
    captures = item.captures(Sizes(batch, item.spec.heads.q, n_q, n_k), torch.Generator().manual_seed(1))
    spec, said = weights_of(item.spec), []
    runner = CppSide(spec, layout_of(k_axes(spec), q, captures), options, said.append)
    if "divisor is made from them" in runner.problem or "every query is computed" in runner.problem:
        return  # the definition makes it
    assert not runner.problem, runner.problem
    for what in ("column_mass", "weights"):
        verdict = Trusted(spec, runner).compare(q, k, captures, item.scalars, what, most=max(n_q, n_k))
        assert verdict.ok, f"{what} of {name} {dtype} {sizes} {layout}: {verdict}"
    assert not said


@pytest.mark.parametrize("name", NAMES)
def test_pairs_agree_with_fp64(name: str, options: Options) -> None:
    for i, sizes in enumerate(((2, 19, 37), (1, 130, 110), (1, 1, 1), (2, 97, 5))):
        judge(name, torch.float32, sizes, LAYOUTS[i], options)


def test_half_precision(options: Options) -> None:
    judge("entropy_zero", torch.bfloat16, (2, 33, 101), "transposed", options)


@pytest.mark.parametrize("name", ["entropy_uniform"])
def test_all_at_once_in_poisoned_memory(name: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operator, by kernels alone, for any number of threads."""
    item = case(name)
    spec, names = replace(item.spec, returns=()), ("entropy", "column_mass", "weights")
    q, k, v = tensors(spec, 2, 50, 61, "contiguous", torch.float32, 1.0)
    captures = item.captures(Sizes(2, spec.heads.q, 50, 61), torch.Generator().manual_seed(1))
    attention(spec, q, k, v, captures, returns=names)
    fresh = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made = fresh(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    found = attention(spec, q, k, v, captures, returns=names)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = attention(spec, q, k, v, captures, returns=names)
    torch.set_num_threads(threads)
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(found[2:], again[2:], strict=True))
    rows = [
        reference(replace(spec, returns=("entropy",)), *(t.to(d) for t in (q, k, v)), captures)[1]
        for d in (torch.float64, q.dtype)
    ]
    assert compare(rows[0], rows[1], found.entropy).ok  # type: ignore[arg-type]
    for what, made in zip(names[1:], found[3:], strict=True):
        golden, eager = (defined(spec, q.to(d), k.to(d), captures, (), what) for d in (torch.float64, q.dtype))
        verdict = compare(golden, eager, made)
        assert verdict.ok, f"{what}: {verdict}"
