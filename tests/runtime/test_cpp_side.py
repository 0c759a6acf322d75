"""Column mass and weights by C++ kernels: through the operator, and where there is no kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from attnopt.codegen.base import Layout
from attnopt.observed import attention
from attnopt.options import Options
from attnopt.runtime import side as operator
from attnopt.runtime.cpp_side import CppSide
from attnopt.runtime.dispatch import AttnoptWarning, use
from attnopt.runtime.pairs import defined
from attnopt.spec import Pointwise
from tests.runtime.cases import CAUSAL, inputs


def test_the_operator_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> torch.Tensor:
        raise AssertionError("the definition ran")

    monkeypatch.setattr(operator, "economical", never)
    q, k, v = inputs(CAUSAL, n_q=9, n_k=9)
    found = attention(CAUSAL, q, k, v, returns=("weights", "column_mass"))
    want = defined(CAUSAL, q, k, (), (), "weights")
    assert_close(found.weights, want)
    assert_close(found.column_mass, want.sum(-2))


def test_without_a_compiler_the_definition_runs_and_says_so(tmp_path: object) -> None:
    q, k, v = inputs(CAUSAL)
    said = r"no kernel makes the weights of .*: no C\+\+ compiler was found"
    with use(Options(cxx="no-such-compiler", cache_dir=str(tmp_path))), pytest.warns(AttnoptWarning, match=said):
        found = operator.side(CAUSAL, "weights", q, k, torch.zeros(2, 4, 5, 2))
    assert_close(found, defined(CAUSAL, q, k, (), (), "weights"))
    assert v is not None


def test_what_has_no_kernel_has_a_reason() -> None:
    from attnopt import expr as ex

    spec = replace(CAUSAL, score=ex.Maximum(ex.s, 0), normalizer=Pointwise(ex.t))
    assert "divisor" in CppSide(spec, Layout("float32"), Options(), print).problem
