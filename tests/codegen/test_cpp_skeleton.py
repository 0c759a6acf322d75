"""Numbers of generated kernels against a dense fp64 evaluation: every case, odd sizes, strides, dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.codegen.base import Plan
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads
from tests.codegen.harness import agree, close, dense, run, tolerance
from tests.specs import CASES, Case, Sizes, case

# (batch, queries, keys): one key, one query, odd lengths, more keys and more queries, several tiles both ways.
SIZES = ((1, 1, 1), (2, 1, 70), (1, 49, 49), (2, 17, 33), (1, 61, 300), (1, 203, 131), (3, 7, 16))


def tensors_of(item: Case, size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and captures of a case, from a fixed seed."""
    batch, n_q, n_k = size
    heads = item.spec.heads
    generator = torch.Generator().manual_seed(batch * 10007 + n_q * 101 + n_k)
    q = torch.randn(batch, heads.q, n_q, heads.d_qk, generator=generator).to(dtype)
    k = torch.randn(batch, heads.k, n_k, heads.d_qk, generator=generator).to(dtype)
    v = torch.randn(batch, heads.v, n_k, heads.d_v, generator=generator).to(dtype)
    return [q, k, v, *item.captures(Sizes(batch, heads.q, n_q, n_k), generator)]


@pytest.mark.parametrize("item", CASES, ids=str)
def test_case_agrees_with_dense_fp64(item: Case) -> None:
    for size in SIZES:
        agree(item.spec, tensors_of(item, size), item.scalars)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "bias", "gqa", "width_40", "narrow_values", "sink"])
def test_half_precision_accumulates_in_fp32(name: str, dtype: torch.dtype) -> None:
    for size in SIZES[2:5]:
        tensors = tensors_of(case(name), size, dtype)
        agree(case(name).spec, [*tensors[:3], *(t.to(dtype) if t.is_floating_point() else t for t in tensors[3:])])


@pytest.mark.parametrize("name", ["causal", "bias", "documents", "softcap", "width_80", "guarded", "empty_uniform"])
def test_four_lanes_agree(name: str) -> None:
    for size in SIZES[2:5]:
        agree(case(name).spec, tensors_of(case(name), size), plan=Plan(16, 32, 4, 4))


@pytest.mark.parametrize(
    "plan", [Plan(6, 16, 8, 6), Plan(8, 48, 8, 8), Plan(96, 512, 16, 6), Plan(5, 20, 8, 3)], ids=str
)
def test_any_plan_agrees(plan: Plan) -> None:
    for size in SIZES[2:]:
        agree(case("prefix_or_window").spec, tensors_of(case("prefix_or_window"), size), plan=plan)


def _strided(t: Tensor, way: str) -> Tensor:
    if way == "heads last":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if way == "width first":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if way == "gaps":
        wide = torch.full([*t.shape[:3], t.shape[3] * 2], torch.nan, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t[:, :1].expand(t.shape)


@pytest.mark.parametrize("way", ["heads last", "width first", "gaps", "one head"])
def test_any_strides(way: str) -> None:
    item = case("causal")
    for size in SIZES[1:5]:
        q, k, v = tensors_of(item, size)
        agree(item.spec, [_strided(q, way), _strided(k, way), _strided(v, way)])


@pytest.mark.parametrize("name", ["bias", "padding", "line", "documents"])
def test_captures_with_any_strides(name: str) -> None:
    item = case(name)
    for size in SIZES[3:5]:
        q, k, v, capture = tensors_of(item, size)
        agree(item.spec, [q, k, v, capture.mT.contiguous().mT])
        agree(item.spec, [q, k, v, capture[..., :1].expand(capture.shape)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_float_captures_of_any_dtype(dtype: torch.dtype) -> None:
    q, k, v, bias = tensors_of(case("bias"), (1, 19, 35))
    agree(case("bias").spec, [q, k, v, bias.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.int8, torch.int16])
def test_integer_captures_of_any_dtype(dtype: torch.dtype) -> None:
    q, k, v, pad = tensors_of(case("padding"), (2, 19, 35))
    agree(case("padding").spec, [q, k, v, pad.to(dtype)])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["gqa", "head_table", "padding_causal"])
def test_threads_do_not_change_a_bit(name: str, threads: int) -> None:
    tensors = tensors_of(case(name), (2, 61, 130))
    once, _ = run(case(name).spec, tensors, threads=threads)
    again, _ = run(case(name).spec, tensors, threads=1)
    assert torch.equal(once, again)


def test_memory_beyond_the_last_key_never_leaks() -> None:
    """Keys, values and captures lie between NaNs."""
    item = case("bias")
    for n_k in (1, 7, 17, 130):
        q, k, v, bias = tensors_of(item, (1, 20, n_k))
        held = []
        for t in (k, v, bias):
            wide = torch.full([*t.shape[:-2], t.shape[-2] + 40, t.shape[-1] + 40], torch.nan)
            wide[..., 20:-20, 20:-20] = t
            held.append(wide[..., 20:-20, 20:-20])
        agree(item.spec, [q, *held])


@pytest.mark.parametrize(("n_q", "n_k", "batch"), [(0, 5, 1), (5, 5, 0), (5, 0, 1)])
@pytest.mark.parametrize("policy", EmptyRow)
def test_sizes_of_zero(policy: EmptyRow, n_q: int, n_k: int, batch: int) -> None:
    item = case("lse")
    out, lse = run(replace(item.spec, empty_row=policy), tensors_of(item, (batch, n_q, n_k)))
    assert out.shape == (batch, 4, n_q, 32)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_nan_in_one_query_stays_in_its_row() -> None:
    q, k, v = tensors_of(case("causal"), (1, 40, 40))
    q[0, 1, 7, 3] = torch.nan
    out, _ = run(case("causal").spec, [q, k, v])
    assert out[0, 1, 7].isnan().all()
    assert out.isnan().sum() == 32


def test_nan_under_the_mask_is_dropped() -> None:
    q, k, v = tensors_of(case("causal"), (1, 40, 40))
    k[0, :, 30] = torch.nan
    out, _ = run(case("causal").spec, [q, k, v])
    assert torch.equal(out.isnan().all(-1)[0, 0], torch.arange(40) >= 30)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_special_numbers_in_a_bias_are_those_of_softmax(value: float) -> None:
    q, k, v, bias = tensors_of(case("bias"), (1, 20, 33))
    bias[0, 3, 5] = value
    agree(case("bias").spec, [q, k, v, bias])


def test_a_row_of_minus_infinity_is_empty() -> None:
    q, k, v, bias = tensors_of(case("bias"), (1, 20, 33))
    bias[0, 3] = -torch.inf
    agree(case("bias").spec, [q, k, v, bias])


def test_a_row_of_the_least_float_is_uniform() -> None:
    least = ex.number(torch.finfo(torch.float32).min)
    spec = replace(case("plain").spec, score=ex.Where(ex.q < 3, least, ex.s))
    q, k, v = tensors_of(case("plain"), (1, 9, 37))
    out, _ = run(spec, [q, k, v])
    expected = v.double().mean(2, keepdim=True).expand(-1, -1, 3, -1)
    close(out[:, :, :3].double(), expected, 37 * torch.finfo(torch.float32).eps)


def test_huge_logits_stay_exact() -> None:
    q, k, v = tensors_of(case("plain"), (1, 33, 65))
    agree(case("plain").spec, [q * 300, k * 300, v])


def test_sink_of_minus_infinity_is_no_sink() -> None:
    item = case("sink")
    q, k, v, _ = tensors_of(item, (1, 12, 12))
    agree(item.spec, [q, k, v, torch.full([4], -torch.inf)])


FUNCTIONS = {
    "exp": sp.exp(ex.s / 10),
    "log": sp.log(sp.Abs(ex.s) + 1),
    "tanh": sp.tanh(ex.s),
    "sin": sp.sin(ex.s),
    "cos": sp.cos(ex.s),
    "erf": sp.erf(ex.s),
    "sign": sp.sign(ex.s),
    "square": ex.s**2 / 16,
    "root": sp.sqrt(sp.Abs(ex.s)),
    "inverse": 1 / (1 + sp.Abs(ex.s)),
    "inverse_root": 1 / sp.sqrt(1 + sp.Abs(ex.s)),
    "power": (1 + sp.Abs(ex.s)) ** sp.Rational(1, 3),
    "trunc": ex.Trunc(ex.s),
    "snap": ex.Snap(ex.s, sp.Rational(1, 4)) + ex.Snap(ex.s, sp.Integer(8)),
    "floor": sp.floor(ex.s),
    "maximum": ex.Maximum(ex.s, sp.Rational(1, 3)),
    "minimum": ex.Minimum(ex.s, sp.Rational(1, 3)),
    "mod": ex.Mod(ex.k - ex.q, 5),
    "floordiv": ex.FloorDiv(ex.k - ex.q, 3) / 4,
    "shift": ex.FloorDiv(ex.k - ex.q, 4) / 4,
    "mask": ex.Mod(ex.k - ex.q, 4),
    "where": ex.Where(sp.Or(ex.s > 0, sp.And(ex.q > 3, ex.k < 5)), ex.s, ex.s / 3),
    "where_row": ex.Where(ex.q > 3, ex.s * 2, ex.k),
    "number_of_row": ex.s * sp.log(ex.q + 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_a_score(name: str) -> None:
    spec = AttentionSpec(Heads(1, 1, 1, 8, 8), score=FUNCTIONS[name])
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, n, 8, generator=generator) for n in (9, 27, 27))
    agree(spec, [q, k, v])


def test_gather_through_an_index_table() -> None:
    """A bias table read at an index that is itself loaded, as in windowed vision models."""
    place = ex.load("place", ex.q, ex.k, integer=True)
    spec = AttentionSpec(
        Heads(3, 3, 3, 32, 32),
        score=ex.s / 6 + ex.load("table", place, ex.h),
        captures=(Capture("place", "int", (None, None)), Capture("table", "float", (None, 3))),
    )
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(5, 3, 49, 32, generator=generator) for _ in range(3))
    place_of, table = torch.randint(0, 169, [49, 49], generator=generator), torch.randn(169, 3, generator=generator)
    agree(spec, [q, k, v, place_of, table])


def test_a_wrong_kernel_would_be_seen() -> None:
    """The bound is tight enough to tell a scale that is off by one part in ten thousand."""
    item = case("scale")
    tensors = tensors_of(item, (1, 61, 300))
    off = replace(item.spec, score=item.spec.score * sp.Rational(10001, 10000))
    out, _ = run(off, tensors)
    bound, _ = tolerance(item.spec, tensors)
    assert (out.double() - dense(item.spec, tensors)[0]).abs().amax() > bound
