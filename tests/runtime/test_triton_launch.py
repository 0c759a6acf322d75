"""Triton as a backend with fake CUDA tensors: everything up to the launch, and every reason to fall back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnopt import expr as ex
from attnopt.codegen import triton
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.triton_plans import CHIPS, TritonPlan
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime.dispatch import AttnoptWarning, Dispatcher, _Site
from attnopt.runtime.triton_launch import Listed, TritonBackend, build, chip_of
from attnopt.runtime.triton_load import load
from attnopt.spec import Capture, Heads
from tests.specs import case

HALF = Layout("bfloat16")
LSE = case("lse").spec


class Recorder:
    """Stands where a kernel stands: `recorder[grid](*arguments)`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.calls.append((grid, arguments, options))
            if self.error is not None:
                raise self.error

        return run


@pytest.fixture
def qkv() -> Iterator[list[torch.Tensor]]:
    with FakeTensorMode():
        yield [torch.empty(2, 4, n, 32, device="cuda", dtype=torch.bfloat16) for n in (100, 70, 70)]


def recorded(backend: TritonBackend, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> Recorder:
    recorder, module = Recorder(error), load(backend.kernel)
    monkeypatch.setattr(module, "attention_forward", recorder)
    monkeypatch.setattr(module.attention, "__defaults__", (recorder, None))
    return recorder


def test_a_call_gets_as_far_as_the_launch(qkv: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build(LSE, HALF, CHIPS["sm_90"], Options())
    recorder = recorded(backend, monkeypatch)
    out, lse = backend(*qkv, (), ())
    ((grid, arguments, options),) = recorder.calls
    plan = backend.kernel.plan
    assert grid == (-(-100 // plan.block_m) * 2 * 4, 1, 1)
    assert options == {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}
    names = [a.name for a in backend.kernel.entries[0].arguments]
    given = dict(zip(names, arguments, strict=True))
    assert given["q_ptr"] is qkv[0]
    assert given["out_ptr"] is out
    assert (given["n_b"], given["n_q"], given["n_k"]) == (2, 100, 70)
    assert [given[f"k_stride{i}"] for i in range(4)] == list(qkv[1].stride())
    assert out.device.type == "cuda"
    assert out.stride() == (100 * 4 * 32, 32, 4 * 32, 1)
    assert lse is not None
    assert lse.shape == (2, 4, 100)


def test_a_plan_that_is_too_large_is_followed_by_the_next(
    qkv: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfResources(Exception):  # noqa: N818
        pass

    backend = build(LSE, HALF, CHIPS["sm_90"], Options())
    first, second = backend.kernels[:2]
    recorded(backend, monkeypatch, OutOfResources("shared memory"))
    monkeypatch.setattr(load(second).attention, "__defaults__", (Recorder(), None))
    backend(*qkv, (), ())
    assert backend.kernel is second
    assert first is not second


def test_few_queries_and_many_keys_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build(replace(LSE, heads=Heads(8, 2, 2, 32, 32)), HALF, CHIPS["sm_90"], Options())
    module, split, combine = load(backend.split[0]), Recorder(), Recorder()
    monkeypatch.setattr(module, "attention_split", split)
    monkeypatch.setattr(module, "attention_combine", combine)
    with FakeTensorMode():
        q, k = (torch.empty(1, h, n, 32, device="cuda", dtype=torch.bfloat16) for h, n in ((8, 1), (2, 8000)))
        out, lse = backend(q, k, k, (), ())
        assert (backend.kind(q, k), backend.kind(k, k)) == ("decode", "forward")
    (((programs, _, _), arguments, _),) = split.calls
    splits = programs // 2  # one tile for each of two key heads
    assert splits == min(132, -(-8000 // backend.split[0].plan.block_n), 128)
    given = dict(zip([a.name for a in backend.split[0].entries[0].arguments], arguments, strict=True))
    assert given["n_splits"] == splits
    assert given["sums_ptr"].shape == (8 * splits, 32)
    given = dict(zip([a.name for a in backend.split[0].entries[1].arguments], combine.calls[0][1], strict=True))
    assert given["out_ptr"] is out
    assert given["lse_ptr"] is lse


def test_what_triton_says_is_the_reason(qkv: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build(LSE, HALF, CHIPS["sm_90"], Options())
    recorded(backend, monkeypatch, RuntimeError("line one\n0 active drivers"))
    with pytest.raises(CompileError, match="0 active drivers"):
        backend(*qkv, (), ())


@pytest.mark.parametrize(
    ("spec", "layout", "reason"),
    [
        (replace(LSE, dropout=0.1), HALF, "no dropout"),
        (LSE, Layout("float64"), "float64"),
        (replace(LSE, heads=Heads(1, 1, 1, 300, 300)), HALF, "up to 256"),
    ],
    ids=["dropout", "float64", "width"],
)
def test_no_backend_without_a_reason(spec: Any, layout: Layout, reason: str) -> None:
    with pytest.raises(CompileError, match=reason):
        build(spec, layout, CHIPS["sm_90"], Options())


KNOWN = {
    (8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120",
}  # fmt: skip


@pytest.mark.parametrize(("found", "name"), KNOWN.items())
def test_known_chips(found: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    assert chip_of(torch.device("cuda")) is CHIPS[name]


def test_an_unknown_chip_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(CompileError, match=r"capability 7\.5"):
        chip_of(torch.device("cuda"))


def test_the_dispatcher_takes_triton_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    site, device = _Site(LSE.text), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert isinstance(Dispatcher(Options())._choose(site, HALF, None, device), TritonBackend)
    assert isinstance(Dispatcher(Options(kernel="triton"))._choose(site, HALF, None, device), TritonBackend)
    assert Dispatcher(Options(kernel="sdpa"))._choose(site, HALF, None, device).name in ("sdpa", "reference")
    assert Dispatcher(Options(kernel="triton"))._choose(site, HALF, None, torch.device("cpu")).name != "triton"


def test_a_chip_without_plans_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    site, dispatcher = _Site(LSE.text), Dispatcher(Options())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(AttnoptWarning, match=r"capability 7\.5.*runs instead") as said:
        for _ in range(3):
            assert dispatcher._choose(site, HALF, None, torch.device("cuda")).name != "triton"
    assert len(said) == 1
    assert "7.5" in site.reason


def test_lengths_and_strides_beyond_32_bits_are_refused(qkv: list[torch.Tensor]) -> None:
    backend = build(LSE, HALF, CHIPS["sm_90"], Options())
    q, k, v = qkv
    with pytest.raises(CompileError, match="counts to"):
        backend(q, k.new_empty((2, 4, 1 << 24, 32)), v, (), ())
    with pytest.raises(CompileError, match="offsets reach"):
        backend(q, k.new_empty(1).as_strided((2, 4, 70, 32), (1, 1, 1 << 26, 1)), v, (), ())


def test_lists_where_they_pay() -> None:
    sinks = replace(LSE, keep=sp.And(ex.k <= ex.q, sp.Or(ex.k < 4, ex.k > ex.q - 300)), captures=()).canonical()
    kernel = triton.emit(sinks, Layout("float32"), TritonPlan(64, 64, 4, 2, listed=True))
    listed = Listed(sinks, [kernel])
    heads = sinks.heads
    q, k = torch.zeros(1, heads.q, 2048, heads.d_qk), torch.zeros(1, heads.k, 2048, heads.d_qk)
    assert listed.pays(q, k, [])
    assert not listed.pays(q[:, :, :64], k, [])
    assert not Listed(sinks, []).pays(q, k, [])
    causal = replace(sinks, keep=ex.k <= ex.q).canonical()
    assert not Listed(causal, [kernel]).pays(q, k, [])
    visited = listed(kernel.plan, (q, k, k))
    assert visited.shape[:3] == (1, heads.q, 32)
    assert visited[0, 0, 10, :5].tolist() == [3, 7, 7, 8, 9]
    # A block that the keys do not fill is never whole: nothing would keep its end out.
    assert listed(kernel.plan, (q[:, :, :40], k[:, :, :40], k))[0, 0, 0].tolist() == [0, 1, 0]


def test_lists_of_masks_that_depend_on_data() -> None:
    """Documents of long sequences on a device; what is chosen anywhere. What padding alone leaves out is no list's worth."""
    same = sp.Eq(ex.load("ids", ex.b, ex.q, integer=True), ex.load("ids", ex.b, ex.k, integer=True))
    padding = sp.Ne(ex.load("ids", ex.b, ex.k, integer=True), 0)
    ids = (Capture("ids", "int", (None, None)),)
    for keep, wanted in ((same, True), (padding, False)):
        spec = replace(LSE, keep=sp.And(keep, ex.k <= ex.q), captures=ids, score=ex.s).canonical()
        listed = Listed(
            spec,
            [triton.emit(spec, Layout("float32", (CaptureLayout("int64", 2),)), TritonPlan(64, 64, 4, 2, listed=True))],
        )
        with FakeTensorMode():
            for device, length in (("cuda", 1 << 14), ("cuda", 1 << 10), ("cpu", 1 << 14)):
                q, k = (torch.empty(1, h, length, spec.heads.d_qk, device=device) for h in (spec.heads.q, spec.heads.k))
                assert listed.pays(q, k, []) is (wanted and (device, length) == ("cuda", 1 << 14))
                listed.known.clear()


def test_loads_are_not_checked_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = case("bias").spec
    backend = build(spec, Layout("bfloat16", (CaptureLayout("float32", 1),)), CHIPS["sm_90"], Options())
    with FakeTensorMode():
        q = torch.empty(1, spec.heads.q, 8, spec.heads.d_qk, device="cuda")
        k = torch.empty(1, spec.heads.k, 8, spec.heads.d_qk, device="cuda")
        bias = torch.empty(spec.heads.q, 8, 8, device="cuda")
        assert backend.leaves(q, k, (bias,), ()) is None
        monkeypatch.setattr("attnopt.runtime.capturing.capturing", lambda: True)
        with pytest.raises(CompileError, match="before the capture"):
            backend.leaves(q, k, (bias,), ())
