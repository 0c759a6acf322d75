"""Rows that are computed and rows that are not, in C++: what is skipped is zero, and what is computed ignores the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.codegen import cpp
from attnopt.codegen.base import CaptureLayout, Layout, Plan
from attnopt.codegen.cpp_plans import listed
from attnopt.errors import SpecError
from attnopt.options import Options
from attnopt.runtime.dispatch import kernel_used, use
from attnopt.runtime.op import attention
from attnopt.spec import AttentionSpec, Capture, Heads

HEADS, WIDTH = 4, 16
_GATE = ex.load("gate", ex.b, ex.h, ex.q)
SPEC = AttentionSpec(
    Heads(HEADS, HEADS, HEADS, WIDTH, WIDTH), score=ex.s / 4, keep=ex.k <= ex.q, gate=_GATE, rows=sp.Ne(_GATE, 0),
    captures=(Capture("gate", "float", (None, None, None)),), returns=("lse",),
).canonical()  # fmt: skip
DENSE = replace(SPEC, rows=sp.true)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A cache of this module's own."""
    return Options(cache_dir=str(tmp_path_factory.mktemp("cache")))


def _inputs(n_q: int, n_k: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, n, WIDTH, generator=generator) for n in (n_q, n_k, n_k)]


def _gates(kind: str, n: int) -> torch.Tensor:
    gates = torch.zeros(2, HEADS, n)
    places = {
        "none": [],
        "all": range(n),
        "first": [0],
        "last": [n - 1],
        "odd": range(1, n, 2),
        "run": range(n // 3, n),
    }
    gates[:, :, list(places[kind])] = 0.75
    return gates


@pytest.mark.parametrize("kind", ["none", "all", "first", "last", "odd", "run"])
@pytest.mark.parametrize("n", [1, 3, 97, 400])
def test_computed_rows_are_those_of_the_dense_kernel(kind: str, n: int, options: Options) -> None:
    q, k, v = _inputs(n, n)
    gates = _gates(kind, n)
    with use(replace(options, kernel="cpp")):
        out, lse = attention(SPEC, q, k, v, [gates])
        dense, dense_lse = attention(DENSE, q, k, v, [gates])
        assert kernel_used(SPEC.key) == "cpp"
    on = gates != 0
    assert_close(out, dense, atol=2e-6, rtol=1e-5)
    assert_close(lse[on], dense_lse[on], atol=2e-6, rtol=1e-5)
    assert not out[~on].any()
    assert bool((lse[~on] == -torch.inf).all())


def test_rows_that_are_not_computed_are_not_read(options: Options) -> None:
    q, k, v = _inputs(70, 70)
    gates = _gates("odd", 70)
    with use(replace(options, kernel="cpp")):
        want, _ = attention(SPEC, q, k, v, [gates])
        q[:, :, ::2] = torch.nan
        got, _ = attention(SPEC, q, k, v, [gates])
    assert torch.equal(got, want)


def test_gradients_are_those_of_the_definition(options: Options) -> None:
    q, k, v = (t.double().requires_grad_() for t in _inputs(9, 9))
    gates = _gates("run", 9).double().requires_grad_()
    with use(options):
        out, _ = attention(replace(SPEC, returns=()), q, k, v, [gates])
    weights = torch.arange(out.numel(), dtype=torch.float64).view(out.shape)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v, gates))
    scores = (q @ k.mT / 4).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    want = torch.where(gates.detach()[..., None] != 0, scores.softmax(-1) @ v * gates[..., None], 0.0)
    expected = torch.autograd.grad((want * weights).sum(), (q, k, v, gates))
    for f, w in zip(found, expected, strict=True):
        assert_close(f, w, atol=1e-9, rtol=1e-9)


def test_the_text_lists_rows_only_where_some_are_left_out() -> None:
    layout = Layout("float32", (CaptureLayout("float32", None),))
    assert "list_rows" in cpp.emit(SPEC, layout).source
    assert "list_rows" in cpp.emit(SPEC, layout, Plan(16, 32, 8, 8, "stream")).source
    assert "list_rows" not in cpp.emit(DENSE, layout).source
    with pytest.raises(SpecError, match="consecutive queries"):
        cpp.emit(SPEC, layout, listed(Plan()))
