"""Which specs `scaled_dot_product_attention` may stand in for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.runtime.reference import reference
from attnopt.runtime.sdpa import Sdpa, sdpa_scale
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
