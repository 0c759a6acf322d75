"""Which backend runs, and what happens when one cannot."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from attnopt.errors import CompileError, ShapeError
from attnopt.options import Options
from attnopt.runtime import dispatch
from attnopt.runtime.dispatch import AttnoptWarning, kernel_used, use, why_not
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from attnopt.spec import EmptyRow
from tests.runtime.cases import BIASED, CAUSAL, PLAIN, inputs, padded
from tests.runtime.test_compile import script

UNIFORM = padded(EmptyRow.UNIFORM)
PAD = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])


@pytest.mark.parametrize(
    ("kernel", "want"), [("auto", "cpp"), ("cpp", "cpp"), ("sdpa", "sdpa"), ("reference", "reference")]
)
def test_option_kernel(kernel: str, want: str, kernel_cache: Path) -> None:
    q, k, v = inputs(CAUSAL)
    with use(Options(kernel=kernel, cache_dir=str(kernel_cache))):
        assert_close(attention(CAUSAL, q, k, v)[0], reference(CAUSAL, q, k, v)[0])
        assert kernel_used(CAUSAL.key) == want
        assert kernel_used("0" * 64) is None


def test_fp64_runs_silently_without_a_compiled_kernel() -> None:
    q, k, v = inputs(CAUSAL, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, _ = attention(CAUSAL, q, k, v)
    assert_close(out, reference(CAUSAL, q, k, v)[0])


@pytest.mark.parametrize(
    "body", [None, 'echo "no template" >&2; exit 1', "sleep 60"], ids=["missing", "failing", "hanging"]
)
def test_without_a_working_compiler_it_says_so_once_and_goes_on(tmp_path: Path, body: str | None) -> None:
    cxx = "/no/such/cxx" if body is None else script(tmp_path / "cxx", body)
    q, k, v = inputs(UNIFORM)
    with use(Options(cxx=cxx, cache_dir=str(tmp_path / "cache"), compile_timeout=0.5)):
        with pytest.warns(AttnoptWarning, match=r"no compiled kernel: .*The reference runs instead") as said:
            out, _ = attention(UNIFORM, q, k, v, [PAD])
        assert len(said) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attention(UNIFORM, q, k, v, [PAD])
        assert kernel_used(UNIFORM.key) == "reference"
        assert why_not(UNIFORM.key)
    assert_close(out, reference(UNIFORM, q, k, v, [PAD])[0])


def test_a_hostile_cache_folder_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    q, k, v = inputs(PLAIN)
    with use(Options(cache_dir=str(tmp_path / "open"))), pytest.warns(AttnoptWarning, match="written by others"):
        out, _ = attention(PLAIN, q, k, v)
        assert kernel_used(PLAIN.key) == "cpp"
    assert_close(out, reference(PLAIN, q, k, v)[0])
    assert list((tmp_path / "open").iterdir()) == []


def test_a_wrong_kernel_is_switched_off_and_its_result_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Wrong(dispatch.Native):
        def __call__(self, *args: object) -> object:  # type: ignore[override]
            out, lse = super().__call__(*args)  # type: ignore[arg-type]
            return out * 1.001, lse

    monkeypatch.setattr(dispatch, "Native", Wrong)
    q, k, v = inputs(PLAIN)
    with use(Options(cache_dir=str(tmp_path / "cache"))), pytest.warns(AttnoptWarning, match="switched off"):
        out, _ = attention(PLAIN, q, k, v)
        assert kernel_used(PLAIN.key) == "sdpa"
    assert_close(out, reference(PLAIN, q, k, v)[0])


def test_a_kernel_that_runs_out_of_memory_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: object, *args: object) -> object:
        raise CompileError("the kernel ran out of memory")

    monkeypatch.setattr(dispatch.Native, "__call__", refuse)
    q, k, v = inputs(PLAIN)
    with use(Options(cache_dir=str(tmp_path / "cache"))), pytest.warns(AttnoptWarning, match="out of memory"):
        out, _ = attention(PLAIN, q, k, v)
    assert_close(out, reference(PLAIN, q, k, v)[0])


def test_a_mask_that_is_too_short_is_never_read_beyond_its_end() -> None:
    q, k, v = inputs(BIASED)
    with pytest.warns(AttnoptWarning, match="reads bias at 0..6 along dimension 2 of size 3"):
        attention(BIASED, q, k, v, [torch.randn(4, 5, 3)])


def test_bad_inputs_are_clear_errors() -> None:
    q, k, v = inputs(PLAIN)
    cases = [
        ((q[:, :3], k, v), r"q must have the shape \[any, 4, any, 8\]; it is \[2, 3, 5, 8\]"),
        ((q, k[:, :, :3], v), "v must have the shape"),
        ((q, k.double(), v), "one dtype"),
        ((q.long(), k.long(), v.long()), "floating-point"),
        ((q, k[:1], v[:1]), "k must have the shape"),
    ]
    for given, message in cases:
        with pytest.raises(ShapeError, match=message):
            attention(PLAIN, *given)
    with pytest.raises(ShapeError, match=re.escape("captures ['bias']")):
        attention(BIASED, q, k, v)
    with pytest.raises(ShapeError, match="must hold floating-point numbers"):
        attention(BIASED, q, k, v, [torch.ones(4, 5, 7, dtype=torch.int64)])
    with pytest.raises(ShapeError, match="scalars"):
        attention(PLAIN, q, k, v, (), [3])


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_sizes_never_reach_the_kernel(sizes: tuple[int, int, int]) -> None:
    out, _ = attention(PLAIN, *inputs(PLAIN, *sizes))
    assert out.shape == (sizes[0], 4, sizes[1], 6)
    assert bool((out == 0).all())
