"""Column mass and weights by Triton kernels: through the operator, and where no plan fits."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnopt.codegen.base import Layout
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import CompileError
from attnopt.runtime.triton_side import TritonSide
from attnopt.spec import Heads
from tests.specs import case

ROOT = Path(__file__).resolve().parent.parent.parent


def test_they_run_through_the_operator() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.side_worker"], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == "agreed", done.stderr[-2000:]


def test_a_head_too_wide_and_keys_too_far_have_none() -> None:
    wide = replace(case("plain").spec, heads=Heads(1, 1, 1, 512, 512))
    assert "512" in TritonSide(wide, Layout("float32"), CHIPS["sm_90"]).problem
    made = TritonSide(case("plain").spec, Layout("float32"), CHIPS["sm_90"])
    assert not made.problem
    assert len(made.kernels) >= 2
    q = torch.empty(1).expand(1, 4, 1 << 25, 32)
    with pytest.raises(CompileError, match="more than the Triton kernel counts to"):
        made(q, q, q, (), (), "weights")
