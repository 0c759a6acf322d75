"""A call of every kind of Triton kernel on zeros, on a CPU, for a driver that takes its launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.linear_form import linear_form
from attnopt.aot.standard import standard
from attnopt.codegen.cpp_loads import k_axes
from attnopt.codegen.triton_plans import CHIPS
from attnopt.options import Options
from attnopt.runtime import triton_gradient, triton_linear
from attnopt.runtime.native import layout_of
from attnopt.runtime.pages import Operands
from attnopt.runtime.triton_ahead import Ahead
from attnopt.runtime.triton_binaries import Binary
from attnopt.runtime.triton_launch import TritonBackend, build
from attnopt.runtime.triton_paged import Paged
from attnopt.runtime.triton_select import Chooser
from attnopt.runtime.triton_side import TritonSide
from attnopt.select import Select
from attnopt.spec import AttentionSpec, Heads

CHIP = CHIPS["sm_90"]
HEADS = Heads(4, 2, 2, 32, 32)
SPECS = {name: spec.canonical() for name, spec in standard(HEADS)}
CHOOSING = replace(SPECS["causal"], returns=(), select=Select("topk", (2,), 16, 16)).canonical()


@dataclass
class Driver:
    """Takes launches in place of a GPU; machine code of the entries in `broken` does not load there."""

    launched: list[str]
    broken: tuple[str, ...] = ()

    def restore(self, binary: Binary) -> Any:
        assert binary.code == f"code of {binary.entry}".encode()
        if binary.entry in self.broken:
            raise RuntimeError("line one\nno kernel image is available")
        return Launch(self.launched, binary.entry)


@dataclass
class Launch:
    """Stands where a kernel stands: `launch[grid](*arguments)`; notes its name."""

    launched: list[str]
    name: str

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 3
        return lambda *arguments, **options: self.launched.append(self.name)


def qkv(n_q: int = 100, n_k: int = 80) -> list[Tensor]:
    return [torch.zeros(2, h, n, 32, dtype=torch.bfloat16) for h, n in ((4, n_q), (2, n_k), (2, n_k))]


def refuse(message: str) -> None:
    raise AssertionError(message)


def backend(spec: AttentionSpec, captures: list[Tensor], options: Options, warn: Any = refuse) -> TritonBackend:
    return build(spec, layout_of(k_axes(spec), qkv()[0], captures), CHIP, options, warn)


def forward(options: Options, name: str, captures: list[Tensor], n_q: int = 100, n_k: int = 80) -> None:
    backend(SPECS[name], captures, options)(*qkv(n_q, n_k), captures, ())


def gradient(options: Options) -> None:
    q, k, v = qkv()
    out, lse = torch.zeros(2, 4, 100, 32, dtype=q.dtype), torch.zeros(2, 4, 100)
    given = SPECS["dense"], out, None, (q, k, v), (), [True] * 3
    assert triton_gradient.gradients(*given, refuse, options, (out, lse)) is not None


def linear(options: Options) -> None:
    form, (q, k, v) = linear_form(SPECS["retention"]), qkv(5000, 5000)
    assert form is not None
    made = triton_linear.build(SPECS["retention"], form, q, options, refuse)
    assert made is not None
    made(q, k, v, (-torch.ones(4),), ())
    about = made.factors(q, k, (-torch.ones(4),), ())
    q.requires_grad_()
    rate = replace(about, rate=about.rate.requires_grad_())
    made.sums(q, k, v, (), rate)[0].sum().backward()


def paged(options: Options) -> None:
    spec = SPECS["causal"]
    pool, table = torch.zeros(9, 16, 2, 32, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.int32)
    given = Operands(qkv()[0], pool, pool, table, torch.full((2,), 60, dtype=torch.int32), (), (), ())
    layout = replace(layout_of((), given.q, ()), page=16)
    Paged(spec, layout, CHIP, Ahead(CHIP, options, refuse))(given, False)


def side(options: Options) -> None:
    q, k, _ = qkv()
    made = TritonSide(SPECS["causal"], layout_of((), q, ()), CHIP, Ahead(CHIP, options, refuse))
    for name in ("weights", "column_mass"):
        made(q, k, torch.zeros(2, 4, 100, 2), (), (), name)


def choose(options: Options) -> None:
    Chooser(CHOOSING, "bfloat16", CHIP, Ahead(CHIP, options, refuse))(*qkv()[:2], (), ())


SLOPE, GATE = [torch.zeros(4)], [torch.ones(2, 4, 100)]
CALLS: dict[str, tuple[tuple[str, ...], dict[str, AttentionSpec], int, Callable[[Options], None], set[str]]] = {
    "forward": (("forward",), {"alibi": SPECS["alibi"]}, 0, lambda o: forward(o, "alibi", SLOPE), {"forward"}),
    "rows": (("forward",), {"routed": SPECS["routed"]}, 0, lambda o: forward(o, "routed", GATE), {"rows", "forward"}),
    "decode": (("decode",), {"dense": SPECS["dense"]}, 0, lambda o: forward(o, "dense", [], 1, 8000),
               {"split", "combine"}),
    "backward": (("backward",), {"dense": SPECS["dense"]}, 0, gradient, {"delta", "dkv", "dq"}),
    "linear": (("linear",), {"retention": SPECS["retention"]}, 0, linear,
               {f"linear_{x}" for x in ("state", "scan", "forward", "sums", "dq", "later", "dkv", "drate")}),
    "select": (("select",), {"chosen": CHOOSING}, 0, choose, {f"select_{x}" for x in ("means", "scores", "choose")}),
    "side": (("side",), {"causal": SPECS["causal"]}, 0, side, {"columns", "weights"}),
    "pages": (("forward",), {"causal": SPECS["causal"]}, 16, paged, {"forward"}),
}  # fmt: skip
