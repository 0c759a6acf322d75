"""The operator under everything that a graph may do to it."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from attnopt.errors import AttnoptError
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from tests.runtime.cases import BIASED, CAUSAL, PLAIN, inputs

OP = torch.ops.attnopt.attention.default
F64 = torch.float64


class Site(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        bias = self.bias[:, : q.shape[2], : k.shape[2]]
        out, lse = attention(BIASED, q, k, v, [bias])
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1) + lse.mean()


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias: bool) -> None:
    spec = BIASED if with_bias else PLAIN
    q, k, v = (t.requires_grad_() for t in inputs(spec))
    captures = [torch.randn(4, 5, 7, requires_grad=True)] if with_bias else []
    results = torch.library.opcheck(OP, (q, k, v, captures, [], spec.text))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_backward() -> None:
    q, k, v = inputs(PLAIN)
    args = (torch.randn(2, 4, 5, 6), None, q, k, v, [], [], PLAIN.text, [True, False, True])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(torch.ops.attnopt.attention_backward.default, args, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}


def test_out_is_a_transposed_view_with_the_fake_strides() -> None:
    q, k, v = inputs(PLAIN)
    out, lse = attention(PLAIN, q, k, v)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, _ = attention(PLAIN, *(mode.from_tensor(t) for t in (q, k, v)))
    assert out.transpose(1, 2).is_contiguous()
    assert out.stride() == fake.stride()
    assert lse.shape == (0,)


def test_gradcheck_in_fp64() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(PLAIN, 2, 3, 4, F64))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(PLAIN, q, k, v)[0], (q, k, v))


def test_gradients_equal_those_of_the_reference_lse_included() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(BIASED))
    bias = torch.randn(4, 5, 7, requires_grad=True)
    leaves = (q, k, v, bias)
    out, lse = attention(BIASED, q, k, v, [bias])
    weight, weight_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out * weight).sum() + (lse * weight_lse).sum(), leaves)
    out, lse = reference(BIASED, q, k, v, [bias])
    want = torch.autograd.grad((out * weight).sum() + (lse * weight_lse).sum(), leaves)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs)


def test_second_derivative_is_a_clear_error() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(PLAIN))
    (grad,) = torch.autograd.grad(attention(PLAIN, q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(AttnoptError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_torch_compile_agrees_with_eager(backend: str) -> None:
    site = Site()
    q, k, v = (t.requires_grad_() for t in inputs(BIASED))
    want = site(q, k, v)
    want_grads = torch.autograd.grad(want.square().sum(), (q, k, v, site.bias))
    got = torch.compile(site, backend=backend, fullgraph=True)(q, k, v)
    got_grads = torch.autograd.grad(got.square().sum(), (q, k, v, site.bias))
    assert_close(got, want)
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        assert_close(mine, theirs)


def test_export_round_trip_with_dynamic_shapes(tmp_path: object) -> None:
    site = Site()
    q, k, v = inputs(BIASED)
    auto = torch.export.Dim.AUTO
    shapes = {"q": {0: auto, 2: auto}, "k": {0: auto, 2: auto}, "v": {0: auto, 2: auto}}
    program = torch.export.export(site, (q, k, v), dynamic_shapes=shapes, strict=False).run_decompositions()
    torch.export.save(program, f"{tmp_path}/site.pt2")
    loaded = torch.export.load(f"{tmp_path}/site.pt2").module()
    other = inputs(BIASED, 3, 9, 11, seed=1)
    assert any(node.target is OP for node in program.graph.nodes)
    assert_close(loaded(*other), site(*other))


def test_make_fx_keeps_one_node() -> None:
    q, k, v = inputs(PLAIN)
    graph = make_fx(lambda q, k, v: attention(PLAIN, q, k, v)[0], tracing_mode="symbolic")(q, k, v)
    other = inputs(PLAIN, 3, 6, 9, seed=2)
    assert sum(node.target is OP for node in graph.graph.nodes) == 1
    assert_close(graph(*other), attention(PLAIN, *other)[0])


@pytest.mark.parametrize("dims", [(0, None, None), (0, 0, 0), (1, None, 0)])
def test_vmap_agrees_with_a_loop(dims: tuple[int | None, ...]) -> None:
    given = [
        torch.stack([t, t + 1, t - 1], d) if d is not None else t for t, d in zip(inputs(PLAIN), dims, strict=True)
    ]
    got = torch.vmap(lambda q, k, v: attention(PLAIN, q, k, v)[0], dims)(*given)
    picked = [[t if d is None else t.select(d, i) for t, d in zip(given, dims, strict=True)] for i in range(3)]
    assert_close(got, torch.stack([attention(PLAIN, *some)[0] for some in picked]))


def test_vmap_over_captures_loops() -> None:
    q, k, v = inputs(BIASED)
    bias = torch.randn(3, 4, 5, 7)
    got, lse = torch.vmap(lambda bias: attention(BIASED, q, k, v, [bias]))(bias)
    assert_close(got, torch.stack([attention(BIASED, q, k, v, [b])[0] for b in bias]))
    assert lse.shape == (3, 2, 4, 5)


def test_autocast_runs_in_its_dtype_and_leaves_captures() -> None:
    q, k, v = inputs(BIASED)
    bias = torch.full((4, 5, 7), torch.finfo(torch.float32).min)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention(BIASED, q, k, v, [bias])
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


def test_causal_rows_do_not_see_later_keys() -> None:
    q, k, v = inputs(CAUSAL, n_q=7)
    before = attention(CAUSAL, q, k, v)[0]
    k, v = k.clone(), v.clone()
    k[:, :, 5:], v[:, :, 5:] = 7.0, -7.0
    assert torch.equal(attention(CAUSAL, q, k, v)[0][:, :, :5], before[:, :, :5])
