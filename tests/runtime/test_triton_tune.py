"""Tuning with a clock that is none: what is measured, kept, read back and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnopt.codegen.base import Layout
from attnopt.codegen.triton_cost import Problem, proposals
from attnopt.codegen.triton_plans import CHIPS, TritonPlan
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import triton_launch
from attnopt.runtime.cache import Cache
from attnopt.runtime.triton_launch import build
from attnopt.runtime.triton_tune import Tuner, device_clock, fastest, progress
from tests.specs import case

CHIP = CHIPS["sm_90"]
SPEC = case("lse").spec
SIZES = Problem(2, 4096, 4096)
PLANS = proposals(SPEC, CHIP, "bfloat16", "forward", SIZES)


class Stopwatch:
    """A clock by which each plan takes what a table says; it sees the plan through the call."""

    def __init__(self, wanted: TritonPlan, fails: TritonPlan | None = None) -> None:
        self.wanted, self.fails, self.running, self.calls = wanted, fails, wanted, 0

    def run(self, plan: TritonPlan) -> None:
        self.calls += 1
        self.running = plan
        if plan == self.fails:
            raise CompileError("too large")

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        return 1.0 if self.running == self.wanted else 2.0


def tuner(folder: Path, clock: Any = None) -> Tuner:
    return Tuner(SPEC, "bfloat16", CHIP, Options(cache_dir=str(folder / "cache"), tune=True), clock)


def test_the_fastest_plan_wins_and_what_does_not_run_is_left_out() -> None:
    assert len(PLANS) > 2
    watch = Stopwatch(PLANS[2], fails=PLANS[0])
    choice = fastest(PLANS, watch.run, watch, progress("tuning"))
    assert choice.plan == PLANS[2]
    assert choice.seconds[str(PLANS[0])] is None
    assert choice.seconds[str(PLANS[2])] == 1.0
    assert len(choice.seconds) == len(PLANS)


def test_no_plan_that_runs_is_a_reason() -> None:
    watch = Stopwatch(PLANS[0], fails=PLANS[0])
    with pytest.raises(CompileError, match="too large"):
        fastest(PLANS[:1], watch.run, watch)
    with pytest.raises(CompileError, match="no plans"):
        fastest((), watch.run, watch)


def test_a_choice_is_measured_once_kept_and_read_back(tmp_path: Path) -> None:
    watch = Stopwatch(PLANS[1])
    assert tuner(tmp_path).plan("forward", SIZES) is None
    assert tuner(tmp_path, watch).plan("forward", SIZES, watch.run) == PLANS[1]
    calls = watch.calls
    assert tuner(tmp_path, watch).plan("forward", SIZES, watch.run) == PLANS[1]
    assert tuner(tmp_path).plan("forward", Problem(3, 4000 // 128 * 128, 4096)) == PLANS[1]
    assert watch.calls == calls
    assert tuner(tmp_path).plan("forward", Problem(2, 64, 4096)) is None
    assert tuner(tmp_path).plan("backward", SIZES) is None


def test_only_plans_of_the_tables_are_taken_from_the_disk(tmp_path: Path) -> None:
    known, watch = tuner(tmp_path), Stopwatch(PLANS[1])
    known.clock = watch
    known.plan("forward", SIZES, watch.run)
    cache, key = Cache(tmp_path / "cache"), known.key("forward", SIZES, "")
    cache.put_note(key, {"plan": {**asdict(PLANS[1]), "block_m": 4096}})
    assert tuner(tmp_path).plan("forward", SIZES) is None
    cache.put_note(key, {"plan": asdict(PLANS[1])})
    assert tuner(tmp_path).plan("forward", SIZES) == PLANS[1]
    path = cache.file(key, ".note")
    path.write_text(path.read_text().replace("block_m", "block_x"))
    assert tuner(tmp_path).plan("forward", SIZES) is None
    assert not path.exists()


def test_notes_depend_on_chip_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tuner(tmp_path)
    keys = {one.key("forward", SIZES, ""), one.key("forward", SIZES, "another card"), one.key("backward", SIZES, "")}
    monkeypatch.setattr("attnopt.runtime.triton_tune.triton_version", lambda: "0.0")
    keys.add(one.key("forward", SIZES, ""))
    assert len(keys) == 4


def test_a_cache_that_cannot_be_used_leaves_the_default(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    watch = Stopwatch(PLANS[1])
    known = tuner(tmp_path, watch)
    assert known.plan("forward", SIZES, watch.run) is None
    assert "cache folder" in known.problem


def test_the_backend_runs_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build(SPEC, Layout("bfloat16"), CHIP, Options(cache_dir=str(tmp_path / "cache"), tune=True))
    heads, usual, last = SPEC.heads, backend.kernel.plan, PLANS[-1]
    ran: list[TritonPlan] = []

    def launch(kernels: list[Any], arguments: Any, more: Any, name: str = "attention", module_of: Any = None) -> Any:
        ran.append(kernels[0].plan)
        return arguments[0], None

    monkeypatch.setattr(triton_launch, "launch", launch)
    assert backend.tuner is not None

    def clock(call: Callable[[], Any]) -> float:
        call()
        return 1.0 if ran[-1] == last else 2.0

    backend.tuner.clock = clock
    with FakeTensorMode():
        q, k = (torch.empty(2, n, 4096, heads.d_qk, device="cuda", dtype=torch.bfloat16) for n in (heads.q, heads.k))
        backend(q, k, k, (), ())
        assert usual != last
        assert set(ran) == set(PLANS)
        assert ran[-1] == last
        assert str(last) in backend.variant(q, k)
        calls = len(ran)
        backend(q, k, k, (), ())
        assert len(ran) == calls + 1
        again = build(SPEC, Layout("bfloat16"), CHIP, Options(cache_dir=str(tmp_path / "cache")))
        again(q, k, k, (), ())
        assert ran[-1] == last


def test_a_note_is_json_that_says_what_was_measured(tmp_path: Path) -> None:
    watch = Stopwatch(PLANS[1])
    known = tuner(tmp_path, watch)
    known.plan("forward", SIZES, watch.run, "H200")
    note = Cache(tmp_path / "cache").note(known.key("forward", SIZES, "H200"))
    assert note is not None
    assert json.loads(json.dumps(note)) == note
    assert note["device"] == "H200"
    assert note["seconds"][str(PLANS[1])] == 1.0  # type: ignore[index]


def test_the_clock_of_the_device_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: object) -> float:
            return times.pop()

    times, calls, ahead = [1.0, 100.0, 3.0], [], []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", ahead.append)
    with FakeTensorMode():
        assert device_clock(lambda: calls.append(1), 3) == 3.0 / 1e3
    assert len(calls) == 5
    assert len(ahead) == 3
