"""The C++ kernel of a linear attention computes what the reference does, in every dtype and at ragged lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch

import attnopt
from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.analysis.mixed_form import mixed_form
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import dispatch, linear
from attnopt.runtime.linear_native import NativeLinear, build_linear, candidates
from attnopt.runtime.native import check_rows
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec
from tests.runtime import test_linear as plain
from tests.runtime import test_mixed as beside

BACK = plain.spec(ex.s * plain.DECAY, ex.q - ex.k >= 70, captures=plain.RATE)
SPECS = {**plain.SPECS, "shifted": plain.spec(keep=ex.q - ex.k >= 100, divide=ex.t + 1), "shifted_decay": BACK}


def _refuse(message: str) -> None:
    raise AssertionError(message)


def _built(given: AttentionSpec, dtype: torch.dtype) -> NativeLinear:
    form = linear_form(given)
    assert form is not None
    found = build_linear(given, form, torch.empty(1, 1, 1, 1, dtype=dtype), Options.make(), _refuse)
    assert found is not None
    return found


CASES = [*((name, torch.float32) for name in SPECS), ("padded", torch.bfloat16), ("decay", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_it_is_as_right_as_the_reference(name: str, dtype: torch.dtype) -> None:
    given = SPECS[name]
    native = _built(given, dtype)
    for sizes in ((150, 150), (7, 150), (150, 7), (65, 64), (1, 1), (64, 129), (300, 300)):
        qkv, captures = plain.inputs(given, *sizes, dtype)
        captures = [x.float() if x.is_floating_point() else x for x in captures]
        found = native(*qkv, captures, ())
        wide = [x.double() for x in qkv], [x.double() if x.is_floating_point() else x for x in captures]
        golden, eager = reference(given, *wide[0], wide[1])[0], reference(given, *qkv, captures, compute=dtype)[0]
        if dtype is torch.float32:
            assert torch.equal(found[0].isfinite(), golden.isfinite())
            usable = golden.isfinite()
            scale = float(golden[usable].abs().max()) if bool(usable.any()) else 1.0
            torch.testing.assert_close(found[0][usable].double(), golden[usable], rtol=1e-5, atol=3e-6 * scale)
        else:
            verdict = compare(golden, eager, found[0])
            assert verdict.ok, (sizes, verdict)


def test_the_first_row_of_a_causal_mask_is_its_value() -> None:
    """A weight over itself: three roundings, whatever the weight. Of many rows few see so few keys."""
    given = plain.spec(keep=ex.q >= ex.k, divide=ex.t)
    draw = torch.Generator().manual_seed(0)
    for length in (1, 64, 200):
        heads = given.heads
        shapes = ((heads.q, heads.d_qk), (heads.k, heads.d_qk), (heads.v, heads.d_v))
        q, k, v = (torch.rand(3, h, length, d, generator=draw) + 0.1 for h, d in shapes)
        out = _built(given, torch.float32)(q, k, v, (), ())[0][:, :, 0]
        first = v[:, list(heads.v_map), 0]
        assert bool(((out - first).abs() <= 2 * torch.finfo(torch.float32).eps * first.abs()).all())


def test_the_sums_of_weights_come_too() -> None:
    given = SPECS["causal"]
    qkv, _ = plain.inputs(given, 130, 130, torch.float32)
    total = _built(given, torch.float32)(*qkv, (), (), total=True)[1]
    weights = (qkv[0] @ qkv[1][:, [0, 0, 1, 1]].mT).tril().sum(-1)
    assert total is not None
    torch.testing.assert_close(total, weights, rtol=1e-5, atol=1e-5)


def test_strides_and_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    given = SPECS["padded"]
    qkv, captures = plain.inputs(given, 130, 130, torch.float32)
    native = _built(given, torch.float32)
    golden = native(*qkv, captures, ())[0]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    spaced = [torch.stack([x, x], -1)[..., 0] for x in qkv]
    for other in (apart, spaced):
        assert torch.equal(native(*other, captures, ())[0], golden)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(native(*qkv, captures, ())[0], golden)


def test_a_long_sequence_loses_no_digits() -> None:
    """The state is summed in fp64: sums of 2^14 values of one are exact."""
    given = AttentionSpec.parse(replace(plain.spec(keep=plain.CAUSAL), heads=attnopt.spec.Heads(1, 1, 1, 1, 1)).text)
    q, k, v = (torch.ones(1, 1, 1 << 14, 1) for _ in range(3))
    out = _built(given, torch.float32)(q, k, 1 + v / 1024, (), ())[0].flatten()
    counted = torch.arange(1, (1 << 14) + 1, dtype=torch.float64) * (1 + 1 / 1024)
    torch.testing.assert_close(out.double(), counted, rtol=1.2e-7, atol=0)


def test_the_candidates_and_what_is_kept() -> None:
    given = SPECS["causal"]
    qkv, _ = plain.inputs(given, 700, 700, torch.float32)
    kept: dict[Any, Any] = {}

    def names(**options: Any) -> list[str]:
        return [x.name for x in candidates(given, qkv[0], qkv[1], Options.make(options), _refuse, attention, kept)]

    assert names() == ["cpp linear", "linear"]
    first = next(iter(kept.values()))
    assert names() == ["cpp linear", "linear"]
    assert next(iter(kept.values())) is first
    assert names(kernel="reference") == names(disable=True) == []
    assert [
        x.name for x in candidates(replace(given, keep=ex.q > 3), *qkv[:2], Options(), _refuse, attention, {})
    ] == []


def test_without_a_compiler_torch_runs() -> None:
    given = plain.spec(ex.s / 7, plain.CAUSAL)
    qkv, _ = plain.inputs(given, 700, 700, torch.float32)
    with (
        dispatch.use(attnopt.Options(cxx="/nowhere/g++")) as used,
        pytest.warns(dispatch.AttnoptWarning),
    ):
        attention(given, *qkv)
        assert used.sites[given.text].used == "linear"


@pytest.mark.parametrize("name", ["padded"])
def test_the_linear_part_of_a_mixed_normaliser(name: str) -> None:
    given = beside.SPECS[name]
    qkv, captures = beside.inputs(given, 150, 150, torch.float32)
    parts = [
        x for x in candidates(given, qkv[0], qkv[1], Options.make(), _refuse,
                              lambda *a: attention(a[-1], *a[:3], *a[3:5]), {})
    ]  # fmt: skip
    assert [x.native is not None for x in parts] == [True, False]
    found = [x(*qkv, captures, ())[0] for x in parts]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert all(check_rows(given, tuple(qkv), captures, (), out, None).ok for out in found)  # type: ignore[arg-type]
    form = mixed_form(given)
    assert form is not None
    assert linear_form(form.far) == form.linear
    assert linear.chosen(given, qkv[0], qkv[1]) is None
    assert sp.true != form.far.keep


@pytest.mark.parametrize("name", ["linear", "mixed"])
def test_a_wrong_kernel_is_switched_off_and_torch_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = SPECS["causal"] if name == "linear" else beside.SPECS["causal"]
    qkv, captures = (plain if name == "linear" else beside).inputs(given, 300, 300, torch.float32)
    whole = NativeLinear.__call__

    def wrong(self: NativeLinear, *args: Any, **more: Any) -> Any:
        out, total = whole(self, *args, **more)
        return out * 1.001, total

    monkeypatch.setattr(NativeLinear, "__call__", wrong)
    with (
        dispatch.use(attnopt.Options(cache_dir=str(tmp_path))) as used,
        pytest.warns(dispatch.AttnoptWarning, match="switched off"),
    ):
        out, _ = attention(given, *qkv, captures)
        site = used.sites[given.text]
        assert site.used == name
        assert "disagrees with the reference" in site.reason
        attention(given, *(x[:, :, :200] for x in qkv), captures)
        assert not any(isinstance(x, NativeLinear) for x in site.backends.values())
    assert check_rows(given, tuple(qkv), captures, (), out, None).ok  # type: ignore[arg-type]


def test_a_kernel_that_fails_later_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = SPECS["causal"]
    qkv, captures = plain.inputs(given, 300, 300, torch.float32)

    def refuse(self: NativeLinear, *args: Any, **more: Any) -> Any:
        raise CompileError("the kernel ran out of memory")

    with dispatch.use(attnopt.Options(cache_dir=str(tmp_path))) as used:
        before, _ = attention(given, *qkv, captures)
        assert used.sites[given.text].used == "cpp linear"
        monkeypatch.setattr(NativeLinear, "__call__", refuse)
        with pytest.warns(dispatch.AttnoptWarning, match="out of memory"):
            after, _ = attention(given, *qkv, captures)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
