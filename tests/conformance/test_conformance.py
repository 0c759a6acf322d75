"""Every spec of the list on every backend, at sizes and layouts that hypothesis picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnopt.options import Options
from attnopt.runtime.dispatch import kernel_used, use
from attnopt.runtime.op import attention
from attnopt.runtime.sdpa import sdpa_scale
from tests.conformance.judge import LAYOUTS, judge, tensors
from tests.specs import CASES, OBSERVED, Case, Sizes, case

SETTINGS = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LENGTHS = st.sampled_from((1, 2, 7, 8, 31, 48, 49, 129, 200))
BATCHES = st.integers(1, 2)


def run(
    item: Case,
    batch: int,
    n_q: int,
    n_k: int,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> None:
    sizes = Sizes(batch, item.spec.heads.q, n_q, n_k)
    inputs = tensors(item.spec, batch, n_q, n_k, layout, dtype, size)
    captures = item.captures(sizes, torch.Generator().manual_seed(1))
    before = [t.clone() for t in (*inputs, *captures)]
    result = attention(item.spec, *inputs, captures, item.scalars)
    verdict = judge(item.spec, inputs, captures, item.scalars, result)
    assert verdict.ok, f"{item} {sizes} {layout} {dtype}: {verdict}"
    assert all(torch.equal(t, b) for t, b in zip((*inputs, *captures), before, strict=True))


# Those that differ in what is summed up or stored; a kernel of each form is compiled for each.
COMPILED = [c for c in OBSERVED if c.name in ("entropy_sink", "entropy_zero", "entropy_uniform", "entropy_routed")]


@pytest.mark.parametrize("item", [*CASES, *COMPILED], ids=str)
def test_cpp(item: Case, options: Options) -> None:
    @SETTINGS
    @given(BATCHES, LENGTHS, LENGTHS, st.sampled_from(LAYOUTS))
    def check(batch: int, n_q: int, n_k: int, layout: str) -> None:
        run(item, batch, n_q, n_k, layout)

    with use(replace(options, kernel="cpp")):
        check()
        assert kernel_used(item.spec.key) == "cpp"


@pytest.mark.parametrize("item", [c for c in CASES if sdpa_scale(c.spec.canonical()) is not None], ids=str)
def test_sdpa(item: Case, options: Options) -> None:
    @SETTINGS
    @given(BATCHES, LENGTHS, LENGTHS, st.sampled_from(LAYOUTS))
    def check(batch: int, n_q: int, n_k: int, layout: str) -> None:
        run(item, batch, n_q, n_k, layout)

    with use(Options(kernel="sdpa", cache_dir=options.cache_dir)):
        check()
        assert kernel_used(item.spec.key) == "sdpa"


@pytest.mark.parametrize("item", [*CASES, *OBSERVED], ids=str)
def test_reference(item: Case, options: Options) -> None:
    with use(Options(kernel="reference", cache_dir=options.cache_dir)):
        run(item, 2, 9, 11)
        run(item, 1, 1, 1, "sliced")
        assert kernel_used(item.spec.key) == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "bias", "gqa", "empty_uniform"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    for n_q, n_k, layout in ((1, 1, "contiguous"), (33, 65, "transposed"), (130, 257, "sliced")):
        run(case(name), 2, n_q, n_k, layout, dtype)
    assert kernel_used(case(name).spec.key) == "cpp"


@pytest.mark.parametrize("name", ["plain", "causal", "additive_mask", "sink", "entropy_sink"])
def test_huge_logits(name: str) -> None:
    run(case(name), 2, 17, 65, size=60.0)


@pytest.mark.parametrize("name", ["scale", "bias", "empty_nan", "entropy_routed"])
def test_every_element_of_poisoned_memory_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(fresh: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: object, **kwargs: object) -> torch.Tensor:
            made = fresh(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return make

    for maker in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, maker, poisoned(getattr(torch, maker)))
    run(case(name), 2, 50, 130)
