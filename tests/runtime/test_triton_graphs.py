"""`torch.compile` on CUDA: Inductor keeps the operator whole, and all around it can be one CUDA graph. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent.parent
FORWARD, BACKWARD = "attnopt.attention.default", "attnopt.attention_backward.default"
# Operators and text that make the host wait for the device, or the graph leave it.
WAITS = ("_local_scalar_dense", "nonzero", "item(", "synchronize()", "device='cpu'")
# Batch, heads, length, width of `inductor_worker`: a result of `[B, n, H, d]` in memory, and contiguous gradients.
RESULT, GRADIENT = "(2, 4, 64, 32), (8192, 32, 128, 1)", "(2, 4, 64, 32), (8192, 2048, 32, 1)"


@pytest.fixture(scope="module")
def passes() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.inductor_worker"], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2, done.stderr[-2000:]
    return found


def test_attention_written_by_hand_is_one_call_of_the_text(passes: list[dict[str, Any]]) -> None:
    for found, backward in zip(passes, (0, 1), strict=True):
        assert found["fused"] == 1
        assert found["nodes"].count(FORWARD) == found["text"].count(f"torch.ops.{FORWARD}(") == 1
        assert found["nodes"].count(BACKWARD) == found["text"].count(f"torch.ops.{BACKWARD}(") == backward
        assert not any("softmax" in name or "bmm" in name for name in found["nodes"])


def test_its_neighbours_are_kernels_of_inductor(passes: list[dict[str, Any]]) -> None:
    for found in passes:
        assert "@triton.jit" in found["text"]
        assert "torch.ops.aten" not in found["text"].split("async_compile.wait", 1)[-1]


def test_inductor_expects_the_layouts_that_the_launchers_make(passes: list[dict[str, Any]]) -> None:
    forward, both = passes
    assert RESULT in forward["text"]
    assert both["text"].count(GRADIENT) >= 3


def test_the_whole_graph_can_be_recorded_and_nothing_waits(passes: list[dict[str, Any]]) -> None:
    for found in passes:
        assert found["unsafe"] is None
        assert found["reason"] is None
        assert not [wait for wait in WAITS if wait in found["text"] or any(wait in name for name in found["nodes"])]
        assert "partition_1" not in found["text"]
