"""The choice of blocks by Triton kernels under the interpreter: as the definition in fp64, and listed as by torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnopt.codegen.triton_plans import CHIPS
from attnopt.options import Options
from attnopt.runtime.chosen import chosen
from attnopt.runtime.triton_select import Chooser, choice, disagreement
from tests.runtime import test_chosen as known

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))
# Ragged lengths, one tile and two, fewer blocks than are wanted, ties, NaN, padding, strides.
JOBS: tuple[dict[str, Any], ...] = (
    {"case": "topk", "dtype": "float32", "sizes": (9, 70), "ties": True},
    {"case": "shared", "dtype": "bfloat16", "sizes": (17, 70), "pad": True, "strided": True},
    {"case": "topk", "dtype": "float32", "sizes": (9, 20), "nan": True},
)
MORE = tuple({"case": name, "dtype": "float16", "sizes": s} for name in known.SELECTS for s in ((40, 70), (21, 9)))


def answers(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.triton_select_worker"], input=json.dumps(jobs), capture_output=True,
        text=True, timeout=1200, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(jobs), done.stderr[-2000:]
    return found


def test_choices_are_those_of_the_definition_and_listed() -> None:
    jobs = [*JOBS, *(MORE if ALL else ()), {"case": "shared", "dtype": "float32", "sizes": (20, 40), "whole": True}]
    *found, whole = answers(jobs)
    for job, answer in zip(jobs, found, strict=False):
        assert not answer["wrong"], (job, answer)
        assert 0 < answer["picked"] <= answer["all"]
        assert set(answer["lists"]) == {"padded" if job.get("pad") else "same"}, (job, answer)
    assert whole["ok"], whole
    assert whole["used"] == "triton"
    assert not any("chooses blocks" in x for x in whole["said"]), whole


def test_without_triton_it_is_torchs_choice() -> None:
    spec = known._spec(known.SELECTS["topk"])
    q, k, _ = known._inputs(40, 40)
    heard: list[str] = []
    for options in (Options(), Options(kernel="triton")):
        assert torch.equal(choice(spec, q, k, (), (), options, heard.append), chosen(spec, q, k))
    assert not heard


def test_what_does_not_launch_is_said_and_chosen_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.runtime.triton_launch.interpreted", lambda: True)
    spec = known._spec(known.SELECTS["mass"])
    q, k, _ = known._inputs(40, 40)
    heard: list[str] = []
    assert torch.equal(choice(spec, q, k, (), (), Options(kernel="triton"), heard.append), chosen(spec, q, k))
    (said,) = heard
    assert "Torch's operators choose them instead" in said


def test_a_choice_that_differs_in_more_than_ties_is_not_trusted() -> None:
    expected = torch.zeros(1, 2, 1000, 4, dtype=torch.bool)
    found = expected.clone()
    found[0, 0, :4, 0] = True
    assert disagreement(found, expected) == ""
    found[0, 1, 7, 2] = True
    assert "5 of 2000 tiles" in disagreement(found, expected)


def test_nothing_is_made_anew_that_no_input_decides() -> None:
    spec = known._spec(known.SELECTS["each head"])
    chooser = Chooser(spec, "bfloat16", CHIPS["sm_90"])
    first = chooser._fixed(torch.device("cpu"))
    assert chooser._fixed(torch.device("cpu")) is first
    assert first[2].tolist() == [1, 2, 3, 4, 5, 6]
    with FakeTensorMode():
        assert chooser._fixed(torch.device("cuda"))[0].device.type == "cuda"
