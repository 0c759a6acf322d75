"""Linear attention on Triton kernels: what runs and how right it is under the interpreter, and every reason not to."""

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

from attnopt.analysis.linear_form import linear_form
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import triton_launch, triton_linear
from attnopt.runtime.linear_native import candidates
from attnopt.runtime.op import attention
from attnopt.runtime.triton_linear import TritonLinear, build, gathered
from attnopt.runtime.triton_load import load
from tests.runtime import test_linear as plain

ROOT = Path(__file__).resolve().parent.parent.parent
# As in the test of the kernels: roundings of an element, and what cancels.
ROUNDINGS = 16


def answers(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the operator did, in a process whose Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.triton_linear_worker"], input=json.dumps(jobs), capture_output=True,
        text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(jobs), done.stderr[-2000:]
    return found


def test_the_operator_takes_them_with_gradients() -> None:
    jobs = [
        {"case": "shifted_decay", "dtype": "float16", "sizes": (160, 150), "learned": True},
        {"case": "mixed_padded", "dtype": "float32", "sizes": (40, 40)},
        {"case": "line", "dtype": "float32", "sizes": (155, 155), "learned": True},
    ]
    for job, answer in zip(jobs, answers(jobs), strict=True):
        assert answer["ok"], (job, answer)
        assert answer["used"] == ("mixed" if str(job["case"]).startswith("mixed") else "triton linear")
        limit = ROUNDINGS * torch.finfo(getattr(torch, str(job["dtype"]))).eps
        assert all(x <= limit for x in answer["errors"]), (job, answer)
        assert not answer["said"], answer["said"]


def test_what_fails_its_check_is_left_with_one_warning() -> None:
    broken = {"case": "all", "dtype": "float32", "sizes": (40, 50)}
    forward, gradient = answers([{**broken, "break": "forward"}, {**broken, "break": "gradient"}])
    assert forward["ok"]
    assert forward["used"] == "linear"
    assert sum("disagrees with the reference" in x for x in forward["said"]) == 2  # once the result, once the gradients
    assert gradient["ok"]
    assert gradient["errors"][0] <= 1e-5


def _backend(monkeypatch: pytest.MonkeyPatch, **options: Any) -> TritonLinear:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    given = plain.SPECS["padded"]
    form = linear_form(given)
    assert form is not None
    with FakeTensorMode():
        made = build(given, form, torch.empty(1, device="cuda", dtype=torch.bfloat16), Options(**options), _refuse)
    assert made is not None
    return made


def _refuse(message: str) -> None:
    raise AssertionError(message)


class Recorder:
    """Stands where a kernel stands."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.calls.append((grid, arguments))
            if self.error is not None:
                raise self.error

        return run


def test_a_call_on_cuda_gets_as_far_as_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, made = _backend(monkeypatch), {}
    entries = {entry.name: [a.name for a in entry.arguments] for entry in backend.kernels[0].entries}
    for name in entries:
        made[name] = Recorder()
        monkeypatch.setitem(load(backend.kernels[0]).KERNELS, name, made[name])
    with FakeTensorMode():
        q, k, v = (torch.empty(2, h, 5000, d, device="cuda", dtype=torch.bfloat16) for h, d in ((4, 8), (2, 8), (4, 6)))
        pad = torch.empty(2, 5000, dtype=torch.bool, device="cuda")
        out, total = backend(q, k, v, [pad], (), total=True)
    assert total is not None
    assert (out.dtype, out.shape, total.shape) == (torch.bfloat16, (2, 4, 5000, 6), (2, 4, 5000))
    assert out.stride() == (5000 * 4 * 6, 6, 4 * 6, 1)
    assert [len(made[x].calls) for x in ("linear_state", "linear_scan", "linear_forward", "linear_sums")] == [
        1,
        1,
        1,
        0,
    ]
    (((programs, _, _), arguments),) = made["linear_forward"].calls
    given = dict(zip(entries["linear_forward"], arguments, strict=True))
    assert programs == 8 * given["segments"]
    assert given["segments"] * given["span"] * backend.kernels[0].plan.block_m >= 5000
    assert given["segments"] > 1, "eight heads do not fill a chip"
    assert given["by_key_stride1"] == 0, "one mask for all heads"


def test_what_triton_says_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _backend(monkeypatch)
    monkeypatch.setitem(load(backend.kernels[0]).KERNELS, "linear_state", Recorder(RuntimeError("0 active drivers")))
    monkeypatch.setitem(load(backend.kernels[0]).KERNELS, "linear_forward", Recorder(RuntimeError("0 active drivers")))
    with FakeTensorMode():
        q, k = (torch.empty(2, h, 50, 8, device="cuda", dtype=torch.bfloat16) for h in (4, 2))
        v, pad = torch.empty(2, 4, 50, 6, device="cuda", dtype=torch.bfloat16), torch.empty(2, 50, device="cuda") != 0
        with pytest.raises(CompileError, match="0 active drivers"):
            backend(q, k, v, [pad], ())


def test_the_candidates_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    given = plain.SPECS["causal"]
    with FakeTensorMode():
        q, k = (torch.empty(2, h, 700, 8, device="cuda", dtype=torch.bfloat16) for h in (4, 2))
        for kernel, names in (
            ("auto", ["triton linear", "linear"]),
            ("triton", ["triton linear", "linear"]),
            ("cpp", []),
        ):
            found = candidates(given, q, k, Options(kernel=kernel), _refuse, attention, {})
            assert [x.name for x in found] == names


@pytest.mark.parametrize(("capability", "dtype", "said"), [((7, 5), "bfloat16", "7.5"), ((9, 0), "float64", "")])
def test_no_backend_has_one_reason(
    capability: tuple[int, int], dtype: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    given, heard = plain.SPECS["causal"], []
    form = linear_form(given)
    assert form is not None
    with FakeTensorMode():
        q = torch.empty(1, device="cuda", dtype=getattr(torch, dtype))
        assert build(given, form, q, Options(), heard.append) is None
    assert [said in x for x in heard] == [True] * bool(said)


def test_gradients_of_heads_are_summed_by_their_map() -> None:
    x = torch.arange(8.0).reshape(1, 4, 2, 1)
    assert gathered(x, (0, 1, 2, 3), 4) is x
    assert torch.equal(gathered(x, (0, 0, 1, 1), 2), x.unflatten(1, (2, 2)).sum(2))
    assert torch.equal(
        gathered(x, (1, 0, 1, 0), 3), torch.stack([x[:, 1] + x[:, 3], x[:, 0] + x[:, 2], 0 * x[:, 0]], 1)
    )


def test_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert triton_launch.runs_on(gpu, Options())
    assert not triton_launch.runs_on(gpu, Options(kernel="sdpa"))
    assert not triton_launch.runs_on(gpu, Options(disable=True))
    assert not triton_launch.runs_on(cpu, Options(kernel="triton"))
    monkeypatch.setattr(triton_launch, "interpreted", lambda: True)
    assert triton_launch.runs_on(cpu, Options(kernel="triton"))
    assert not triton_launch.runs_on(cpu, Options())
    assert triton_launch.chip_of(cpu) in CHIPS.values()
    assert triton_linear.TritonLinear.name == "triton linear"
