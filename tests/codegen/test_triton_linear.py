"""The chunked linear kernels in Triton: their gradients and results under the interpreter, and that they fit the chips."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_linear import emit_linear, linear_plans, supported_linear
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import SpecError
from attnopt.runtime.triton_compile import PRODUCTS, compile_entry
from attnopt.spec import AttentionSpec, Heads, Pointwise

ROOT = Path(__file__).resolve().parent.parent.parent
BF16 = Layout("bfloat16")
ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))
# Of a sum of products relative to the largest result: each of three roundings of an element, and what cancels.
ROUNDINGS = 8
SHAPES = [(True, False, (37, 37)), (True, True, (50, 50)), (False, False, (37, 21)), (True, False, (1, 1))]


def _spec(width: int = 64, **changes: Any) -> AttentionSpec:
    base = AttentionSpec(Heads(8, 2, 2, width, width), ex.s, ex.q - ex.k >= 0, Pointwise())
    return replace(base, **changes).canonical()


def _kernel(spec: AttentionSpec, layout: Layout, chip: str = "sm_90") -> Any:
    form = linear_form(spec)
    assert form is not None
    plan = linear_plans(CHIPS[chip], layout.dtype, spec.heads.d_qk, spec.heads.d_v)[0]
    return emit_linear(spec, form, layout, plan)


def test_results_and_gradients_agree_with_fp64() -> None:
    jobs = [
        {"causal": causal, "decay": decay, "sizes": sizes, "dtype": dtype, "chunk": 16}
        for causal, decay, sizes in SHAPES
        for dtype in ("float32", "bfloat16", "float16")
    ]
    jobs = jobs if ALL else [jobs[0], jobs[4], jobs[8], jobs[9]]
    done = subprocess.run(
        [sys.executable, "-m", "tests.codegen.linear_worker"], input=json.dumps(jobs), capture_output=True, text=True,
        timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(jobs), done.stderr[-2000:]
    for job, answer in zip(jobs, answers, strict=True):
        limit = ROUNDINGS * torch.finfo(getattr(torch, str(job["dtype"]))).eps
        assert all(error <= limit for error in answer.values()), (job, answer)


def test_the_text_is_a_module_that_says_what_it_is() -> None:
    made = _kernel(_spec(), BF16)
    tree = ast.parse(made.source)
    assert "key     " + made.spec_key in (ast.get_docstring(tree) or "")
    assert "CAUSAL = tl.constexpr(True)" in made.source
    assert [entry.name for entry in made.entries] == ["linear_forward", "linear_dq", "linear_dkv"]
    functions = {f.name: [a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)}
    for entry in made.entries:
        assert [a.name for a in entry.arguments] == functions[entry.name]


@pytest.mark.parametrize("chip", CHIPS.values() if ALL else [CHIPS["sm_90"]], ids=lambda c: c.name)
def test_they_fit_and_run_on_tensor_cores(chip: Any) -> None:
    spec = _spec()
    form = linear_form(spec)
    assert form is not None
    for plan in linear_plans(chip, "bfloat16", 64, 64)[:1]:
        made = emit_linear(spec, form, BF16, plan)
        for entry in made.entries if ALL else made.entries[:1]:
            found = compile_entry(made, entry, chip)
            assert found.problem is None, found.problem
            products = {PRODUCTS[chip.name], "mma.sync"}
            assert any(found.instructions.get(name, 0) for name in products), found.instructions


@pytest.mark.parametrize(
    ("changes", "layout", "said"),
    [
        ({}, Layout("float64"), "no float64"),
        ({"heads": Heads(8, 2, 2, 256, 64)}, BF16, "256 x 64"),
        ({"heads": Heads(4, 2, 2, 8, 8, (0, 1, 0, 1), (0, 1, 0, 1))}, BF16, "one run of query heads"),
        ({"keep": ex.q - ex.k + ex.n_k - ex.n_q >= 0}, BF16, "from the first key on"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_said(changes: dict[str, Any], layout: Layout, said: str) -> None:
    spec = _spec(**changes)
    form = linear_form(spec)
    assert form is not None
    assert said in str(supported_linear(spec, form, layout))
    with pytest.raises(SpecError, match=said):
        emit_linear(spec, form, layout, linear_plans(CHIPS["sm_90"], "bfloat16", 64, 64)[0])


def test_plans() -> None:
    assert linear_plans(CHIPS["sm_90"], "bfloat16", 256, 64) == ()
    assert all(plan.fp32 == "tf32x3" for plan in linear_plans(CHIPS["sm_80"], "float32", 32, 64))
