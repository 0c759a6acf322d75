"""The choice of blocks by Triton kernels under the interpreter: as the definition in fp64, and listed as by torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from attnopt import expr as ex
from attnopt.analysis.chosen import lowered
from attnopt.codegen.triton_plans import CHIPS
from attnopt.options import Options
from attnopt.runtime import lists
from attnopt.runtime.chosen import chosen
from attnopt.runtime.lists import Lists
from attnopt.runtime.triton_lists import Visits
from attnopt.runtime.triton_load import load
from attnopt.runtime.triton_select import Chooser, choice, disagreement
from attnopt.spec import AttentionSpec, Capture
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
        assert set(answer["lists"]) == {"same"}, (job, answer)
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


class Watch(TorchDispatchMode):
    """Remembers the operators that make the host wait for a device, or move something between them.

    The device is `meta`, where nothing can be read at all.
    """

    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count += 1
        devices = {x.device.type for x in (*args, made) if isinstance(x, torch.Tensor)}
        if func.__name__.split(".")[0] in self.waits or (devices == {"cpu", "meta"} and "copy" in func.__name__):
            self.seen.append(func.__name__)
        return made


class Silent:
    """Stands where a kernel stands."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: None


KERNELS = ("select_means", "select_scores", "select_choose", "select_list")


@pytest.mark.parametrize("captured", [False, True])
def test_nothing_waits_for_a_device_whatever_the_mask_depends_on(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and a choice: after a first call, also while a CUDA graph is recorded, at sizes not seen before too."""
    spec = known._spec(known.SELECTS["topk"], pad=True)
    chooser, plain = Chooser(spec, "bfloat16", CHIPS["sm_90"]), lowered(spec)
    visits = Visits(plain, Lists(plain, (128, 64), ragged=True))
    for kernels in (chooser.kernels, visits.kernels):
        for name in KERNELS:
            monkeypatch.setattr(load(kernels[0]), name, Silent())
    monkeypatch.setattr(lists, "capturing", lambda: captured)
    chooser._fixed(torch.device("meta"))
    for length in (1000, 3000):
        q, k = (torch.empty(2, h, length, 8, device="meta", dtype=torch.bfloat16) for h in (6, 2))
        pad = torch.empty(2, length, device="meta", dtype=torch.bool)
        with Watch() as watch:
            found = chooser(q, k, [pad], ())
            listed = visits(q, k, [pad, found], ())
        assert found.shape == (2, 6, -(-length // 16), -(-length // 16))
        assert listed is not None
        assert listed.shape == (2, 6, -(-length // 128), 2 + -(-length // 64))
    assert watch.count > 10
    assert not watch.seen, watch.seen


def test_documents_are_listed_by_the_device() -> None:
    same = sp.Eq(ex.load("ids", ex.b, ex.q, integer=True), ex.load("ids", ex.b, ex.k, integer=True))
    ids = (Capture("ids", "int", (None, None)),)
    spec = AttentionSpec(known.HEADS, ex.s, sp.And(same, ex.k <= ex.q), captures=ids).canonical()
    made = Lists(spec, (128, 64), ragged=True)
    with Watch() as watch:
        q, k = (torch.empty(2, h, 1000, 8, device="meta") for h in (6, 2))
        found = made(q, k, [torch.empty(2, 1000, device="meta", dtype=torch.int64)], ())
    assert found.shape == (2, 1, 8, 2 + 16)
    assert not watch.seen, watch.seen


def test_what_a_recorded_graph_makes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(known.HEADS, ex.s, ex.k <= ex.q).canonical()
    made = Lists(spec, (128, 64))
    monkeypatch.setattr(lists, "capturing", lambda: True)
    with Watch() as watch:
        q, k = (torch.empty(2, h, 1000, 8, device="meta") for h in (6, 2))
        made(q, k, [], ())
    assert not made.known
    assert not watch.seen, watch.seen
    monkeypatch.undo()
    q, k, _ = known._inputs(300, 300)
    wanted = made(q, k, [], ())
    assert list(made.known)
    on_device = lists.packed(made._on_device(lists.sizes_of(spec, q, k, ()), {}, torch.device("cpu")))
    assert torch.equal(on_device, wanted)
