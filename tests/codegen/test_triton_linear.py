"""The chunked linear kernels in Triton: their gradients and results under the interpreter, and that they fit the chips."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch

pytest.importorskip("triton")

from attnopt import expr as ex
from attnopt._version import VERSION
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_linear import emit_linear, linear_plans, supported_linear
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import SpecError
from attnopt.runtime.triton_compile import PRODUCTS, compile_entry
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise

ROOT = Path(__file__).resolve().parent.parent.parent
BF16 = Layout("bfloat16")
ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))
# Of a sum of products relative to the largest result: each of three roundings of an element, and what cancels.
ROUNDINGS = 8
CASES: tuple[dict[str, Any], ...] = (
    {"sizes": (40, 50), "offset": 5, "decay": True, "segments": 3},
    {"sizes": (37, 21)},
    {"sizes": (20, 40), "segments": 2, "factors": True},
    {"sizes": (30, 50), "segments": 3, "factors": True, "offset": 20, "strided": True, "line": True},
    {"sizes": (40, 30), "segments": 2, "decay": True, "offset": -20},
    {"sizes": (1, 1), "offset": 0},
    {"sizes": (40, 20), "offset": -10, "line": True},
)


def _spec(width: int = 64, **changes: Any) -> AttentionSpec:
    base = AttentionSpec(Heads(8, 2, 2, width, width), ex.s, ex.q - ex.k >= 0, Pointwise())
    return replace(base, **changes).canonical()


def _kernel(spec: AttentionSpec, layout: Layout, chip: str = "sm_90") -> Any:
    plan = linear_plans(CHIPS[chip], layout.dtype, spec.heads.d_qk, spec.heads.d_v)[0]
    return emit_linear(spec, layout, plan)


def test_results_and_gradients_agree_with_fp64() -> None:
    """Raw and finished results and all gradients, over ragged lengths, cut into segments, shifted, with factors."""
    jobs = [{**about, "dtype": dtype, "chunk": 16} for about in CASES for dtype in ("float32", "bfloat16", "float16")]
    jobs = jobs if ALL else [job for i, job in enumerate(jobs) if i % 3 == (i // 3) % 3]
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
    names = [entry.name for entry in made.entries]
    assert "LINE = tl.constexpr(False)" in made.source
    assert names == [*(f"linear_{x}" for x in ("state", "scan", "forward", "dq", "later", "dkv")), "linear_sums"]
    functions = {f.name: [a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)}
    functions["linear_sums"] = functions["linear_forward"]
    for entry in made.entries:
        assert [a.name for a in entry.arguments] == functions[entry.name]
    kinds = {entry.name: {a.name: a.kind for a in entry.arguments}["out_ptr"] for entry in made.entries
             if entry.name in ("linear_forward", "linear_sums")}  # fmt: skip
    assert kinds == {"linear_forward": "bfloat16", "linear_sums": "float32"}


def test_a_decay_has_a_kernel_for_its_rate_and_a_line_of_places_has_none() -> None:
    rate, line = Capture("rate", "float", (8,)), Capture("line", "float", (None, 8, None))
    fading = _kernel(_spec(score=ex.s * sp.exp(ex.load("rate", ex.h) * (ex.k - ex.q)), captures=(rate,)), BF16)
    places = sp.exp(ex.load("line", ex.b, ex.h, ex.q) - ex.load("line", ex.b, ex.h, ex.k))
    lined = _kernel(_spec(score=ex.s * places, captures=(line,)), BF16)
    has = ["linear_drate" in [entry.name for entry in made.entries] for made in (fading, lined, _kernel(_spec(), BF16))]
    assert has == [True, False, False]
    for made, flags in ((fading, (True, False)), (lined, (False, True))):
        assert [f"{x} = tl.constexpr({y})" in made.source for x, y in zip(("DECAY", "LINE"), flags, strict=True)] == [
            True,
            True,
        ]


def test_what_differs_from_spec_to_spec_is_golden(golden: Callable[[str, str], None]) -> None:
    made = _kernel(_spec(32, normalizer=Pointwise(ex.Maximum(ex.t, 1))), BF16).source
    own = made[: made.index("@triton.jit\ndef powers")].rstrip() + "\n"
    golden("triton_linear.py", own.replace(f"attnopt {VERSION}", "attnopt VERSION"))


@pytest.mark.parametrize("chip", CHIPS.values() if ALL else [CHIPS["sm_90"]], ids=lambda c: c.name)
def test_they_fit_and_run_on_tensor_cores(chip: Any) -> None:
    spec = _spec()
    for plan in linear_plans(chip, "bfloat16", 64, 64)[:1]:
        made = emit_linear(spec, BF16, plan)
        for entry in made.entries if ALL else made.entries[:1]:
            found = compile_entry(made, entry, chip)
            assert found.problem is None, found.problem
            if entry.name == "linear_scan":  # sums up
                continue
            products = {PRODUCTS[chip.name], "mma.sync"}
            assert any(found.instructions.get(name, 0) for name in products), found.instructions


@pytest.mark.parametrize(
    ("changes", "layout", "said"),
    [
        ({}, Layout("float64"), "no float64"),
        ({"heads": Heads(8, 2, 2, 256, 64)}, BF16, "256 x 64"),
        ({"normalizer": Pointwise(ex.t + ex.load("x", ex.h))}, BF16, "divides a row"),
        ({"keep": ex.Mod(ex.q - ex.k, 2) >= 1}, BF16, "no linear form"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_said(changes: dict[str, Any], layout: Layout, said: str) -> None:
    captures = (Capture("x", "float", (None,)),) if "normalizer" in changes else ()
    spec = _spec(**changes, captures=captures)
    assert said in str(supported_linear(spec, layout))
    with pytest.raises(SpecError, match=said):
        emit_linear(spec, layout, linear_plans(CHIPS["sm_90"], "bfloat16", 64, 64)[0])


def test_any_head_map_and_any_offset_has_a_kernel() -> None:
    for changes in (
        {"heads": Heads(4, 2, 4, 8, 8, (0, 1, 0, 1), (3, 2, 1, 0))},
        {"keep": ex.q - ex.k + ex.n_k >= ex.n_q},
    ):
        assert supported_linear(_spec(**changes), BF16) is None
    assert "return h % 2" in _kernel(_spec(heads=Heads(4, 2, 4, 8, 8, (0, 1, 0, 1), (3, 2, 1, 0))), BF16).source


def test_plans() -> None:
    assert linear_plans(CHIPS["sm_90"], "bfloat16", 256, 64) == ()
    assert linear_plans(CHIPS["sm_90"], "float32", 128, 64) == ()
    assert all(plan.fp32 == "tf32x3" for plan in linear_plans(CHIPS["sm_80"], "float32", 32, 64))
    assert linear_plans(CHIPS["sm_80"], "bfloat16", 64, 64) != linear_plans(CHIPS["sm_90"], "bfloat16", 64, 64)
