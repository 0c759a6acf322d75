"""Kernels of pages behind the operator: which one runs, what is compared, and every reason not to."""

from __future__ import annotations

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
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.triton_plans import CHIPS
from attnopt.runtime.triton_paged import Paged
from attnopt.spec import AttentionSpec, Capture, Heads
from tests.conformance.judge import tensors
from tests.conformance.paged_inputs import paged
from tests.runtime.test_pages import LAST, PADDED

ROOT = Path(__file__).resolve().parent.parent.parent


def answers(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the operator did, in a process whose Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.paged_worker"], input=json.dumps(jobs), capture_output=True,
        text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(jobs), done.stderr[-2000:]
    return found


def test_the_operator_runs_them_and_compares_the_first_result() -> None:
    few = {"spec": "last", "lengths": [40, 0, 7], "n_q": 1, "page": 16}
    forward, decode, padded, later, short, wrong = answers(
        [
            few,
            {**few, "slots": 32},  # room for 512 keys: splits pay
            {**few, "spec": "padded"},
            {**few, "spec": "padded", "new": 2},
            {**few, "spec": "padded", "pad": 39},
            {**few, "factor": 1.5},
        ]
    )
    for answer, kind in ((forward, "forward"), (decode, "decode"), (padded, "forward"), (later, "forward")):
        assert answer["ran"] == [kind, kind]
        assert not answer["said"]
        assert max(answer["errors"]) < 1e-5
    assert short["ran"] == []
    assert "reads pad at 0..39 along dimension 1 of size 39" in short["said"][0]
    assert wrong["ran"] == ["forward"]  # and never again
    assert "disagrees with the definition" in wrong["said"][0]
    assert max(wrong["errors"]) < 1e-5


def backend(spec: AttentionSpec, page: int = 16, chip: str = "sm_90") -> Paged:
    layout = Layout("bfloat16", tuple(CaptureLayout("int64", 1) for _ in spec.captures), page)
    return Paged(spec.canonical(), layout, CHIPS[chip])


def test_kernels_are_chosen_by_rows_and_room() -> None:
    made = backend(LAST)
    given = paged(tensors(LAST, 2, 1, 40, "contiguous", torch.bfloat16, 1.0), (40, 3), 16)
    assert made.kind(given) == "forward"
    wide = replace(given, page_table=given.page_table.repeat(1, 20))
    assert made.kind(wide) == "decode"
    assert made.kind(replace(wide, q=wide.q.repeat(1, 1, 100, 1))) == "forward"
    routed = replace(PADDED, rows=ex.q < 3)
    assert backend(routed).kind(given) == "decode"


def test_specs_that_no_kernel_takes_say_why() -> None:
    wide = replace(LAST, heads=Heads(2, 2, 2, 512, 512))
    assert "heads of up to 256" in backend(wide).problem
    nested = ex.load("table", ex.load("ids", ex.k, integer=True))
    captures = (Capture("table", "float", (None,)), Capture("ids", "int", (None,)))
    by_data = AttentionSpec(LAST.heads, score=ex.s + nested, captures=captures)
    made = Paged(
        by_data.canonical(),
        Layout("float32", (CaptureLayout("float32", None), CaptureLayout("int64", 1)), 16),
        CHIPS["sm_90"],
    )
    assert "depends on a tensor's content" in made.problem


def test_captures_have_to_reach_the_longest_entry_only() -> None:
    made = backend(PADDED)
    inputs = tensors(PADDED, 2, 1, 40, "contiguous", torch.bfloat16, 1.0)
    for size, problem in ((64, ""), (40, ""), (39, "reads pad at 0..39 along dimension 1 of size 39")):
        given = paged(inputs, (40, 3), 16, [torch.ones((2, size), dtype=torch.int64)])
        assert given.room == 64
        assert problem in made._leaves(given)
        assert bool(made._leaves(given)) == bool(problem)
    assert len(made.inside) == 1  # what room for all keys proves once, no length has to be read for
