"""Which specs `scaled_dot_product_attention` may stand in for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.runtime.reference import reference
from attnopt.runtime.sdpa import Sdpa, cheaper, sdpa_scale
from attnopt.spec import AttentionSpec, Heads
from tests.runtime.cases import BIASED, CAUSAL, PLAIN, inputs


@pytest.mark.parametrize("spec", [PLAIN, CAUSAL, replace(CAUSAL, score=ex.s)])
def test_what_it_computes_it_computes_right(spec: AttentionSpec) -> None:
    q, k, v = inputs(spec)
    assert sdpa_scale(spec) is not None
    assert_close(Sdpa(spec)(q, k, v, (), ())[0], reference(spec, q, k, v)[0])


@pytest.mark.parametrize(
    "spec",
    [
        BIASED,
        replace(PLAIN, keep=sp.Ge(ex.q - ex.k + 1, 0)),
        replace(PLAIN, score=sp.tanh(ex.s)),
        replace(PLAIN, gate=ex.q + 1),
        replace(PLAIN, returns=("lse",)),
        replace(PLAIN, heads=Heads(4, 2, 2, 8, 6, (1, 0, 1, 0))),
        replace(PLAIN, score=ex.s / ex.n_k),
    ],
)
def test_what_it_does_not_compute_is_refused(spec: AttentionSpec) -> None:
    assert sdpa_scale(spec) is None


def _costs(batch: int, heads: int, n_q: int, n_k: int, width: int = 64, **about: object) -> str:
    q, k = (torch.empty(batch, heads, n, width, **about) for n in (n_q, n_k))  # type: ignore[call-overload]
    return cheaper(q, k, k)


@pytest.mark.parametrize("size", [(1, 8, 1, 1), (1, 12, 1, 64), (1, 8, 8, 8), (1, 4, 32, 32, 32), (1, 2, 32, 32)])
def test_short_calls_are_cheaper_without_a_kernel_of_their_own(size: tuple[int, ...]) -> None:
    assert "short" in _costs(*size)


@pytest.mark.parametrize("size", [(4, 8, 8, 8), (1, 32, 1, 64, 128), (1, 12, 1, 1024), (1, 8, 128, 128), (64, 8, 4, 4)])
def test_longer_calls_are_not(size: tuple[int, ...]) -> None:
    assert not _costs(*size)


def test_what_was_not_measured_takes_the_kernel() -> None:
    assert not _costs(1, 8, 1, 1, dtype=torch.bfloat16)
    assert not _costs(1, 8, 1, 1, device="meta")
    assert not _costs(1, 8, 0, 1)
    q, shared = torch.empty(1, 8, 1, 64), torch.empty(1, 2, 1, 64)
    assert not cheaper(q, shared, shared)
    assert not cheaper(q[0], q[0], q[0])
