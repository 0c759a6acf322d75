"""What kernels alone do not show: the ways on which models reach them, each once on the chip, against fp64."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.chosen import lowered
from attnopt.aot.inputs import usual_inputs
from attnopt.aot.standard import layout_for, standard
from attnopt.codegen import triton
from attnopt.codegen.triton_fit import fitting
from attnopt.codegen.triton_plans import Chip
from attnopt.options import Options
from attnopt.runtime import dispatch
from attnopt.runtime.cpp_gradient import objection
from attnopt.runtime.native import check_rows
from attnopt.runtime.op import attention
from attnopt.runtime.triton_ahead import Ready
from attnopt.runtime.triton_call import launch
from attnopt.runtime.triton_gradient import Kernels
from attnopt.runtime.validate import compare
from attnopt.select import Select
from attnopt.spec import AttentionSpec, Capture, Heads
from gpu_parts import special
from gpu_parts.decays import decayed
from gpu_parts.rows import Row

Result = dict[str, Any]
_HEADS = Heads(8, 2, 2, 128, 128)
_SCALED = ex.number(128**-0.5) * ex.s
# Kernels of 16-bit elements; what runs where there is no GPU is for tests of this file.
_DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
_KERNEL = {"cuda": "triton", "cpu": "cpp"}


def _told(run: Callable[[], Result]) -> Result:
    """The result of `run`, which is wrong if anything was warned of."""
    with warnings.catch_warnings(record=True) as heard, dispatch.use(Options()):
        warnings.simplefilter("always", dispatch.AttnoptWarning)
        result = run()
    said = [str(w.message) for w in heard if issubclass(w.category, dispatch.AttnoptWarning)]
    return result if not said else {"ok": False, "note": f"{said[0]}; {result['note']}"}


def _verdict(spec: AttentionSpec, tensors: list[Tensor], out: Tensor, kernel: str) -> Result:
    """Whether the result is right and came from the kernel of this name."""
    q, k, v, *captures = tensors
    verdict, used = check_rows(spec, (q, k, v), captures, (), out, None), dispatch.kernel_used(spec.key)
    return {"ok": verdict.ok and used == kernel, "note": f"{used}: {verdict}"}


def decays(chip: Chip, device: str, kind: str) -> Result:
    """Linear attention with a learned decay, by kernels of linear cost in both directions."""
    found = _told(lambda: decayed(device, _DTYPE[device], kind))
    linear = {"triton": "triton linear", "cpp": "cpp linear"}[_KERNEL[device]]
    return {"ok": found["ok"] and found["used"] == linear, "note": found["note"]}


def select(chip: Chip, device: str, rule: str, padded: bool = False) -> Result:
    """Blocks chosen on the device, and attention by the list that is written there; also under padding."""
    amount = {"topk": sp.Integer(4), "mass": sp.Rational(3, 4)}[rule]
    about = Select(rule, (amount,), block=64, tile=64, own=ex.q, first=1, scale=sp.Rational(1, 8))
    pad = (Capture("pad", "bool", (None, None)),) if padded else ()
    there = sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0) if padded else sp.true
    keep = sp.And(ex.k <= ex.q, there)
    spec = AttentionSpec(_HEADS, _SCALED, keep, select=about, captures=pad).canonical()
    q, k, v, *_ = usual_inputs(spec, 2, 1000, 1000, _DTYPE[device], device)
    given = [torch.arange(1000, device=device) < torch.tensor([[1000], [700]], device=device)] if padded else []

    def run() -> Result:
        out, _ = attention(spec, q, k, v, given)
        made = dispatch.choice(spec, q, k, given, (), Options(), warnings.warn)
        return _verdict(lowered(spec), [q, k, v, *given, made], out, _KERNEL[device])

    return _told(run)


def listed(chip: Chip, device: str) -> Result:
    """A map of blocks, which becomes lists that the kernel goes by."""
    row = Row("", "blocks", _HEADS, 1, 1024, 1024, 0.25, "sparse")
    call, tensors = special.call(row, _DTYPE[device], device, Options())
    return _told(lambda: _verdict(special.spec_of(row), tensors, call(), _KERNEL[device]))


def graph(chip: Chip, device: str) -> Result:
    """A CUDA graph recorded after warm-up calls, replayed on other numbers."""
    spec = dict(standard(_HEADS))["causal_bottom_right"]
    tensors = usual_inputs(spec, 2, 200, 456, _DTYPE[device], device)

    def run() -> Result:
        call = lambda: attention(spec, *tensors)[0]  # noqa: E731
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(), call()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            out = call()
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
        out.fill_(torch.nan)
        recorded.replay()
        return _verdict(spec, tensors, out, _KERNEL[device])

    return _told(run)


class Layer(torch.nn.Module):
    """Causal attention as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(256, 768), torch.nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, n, 256]`, and so is the result."""
        batch, n, _ = x.shape
        q, k, v = self.inner(x).view(batch, n, 3, 4, 64).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 8.0
        later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.outer((weights @ v).transpose(1, 2).reshape(batch, n, 256))


def compiled(chip: Chip, device: str, mode: str | None) -> Result:
    """An optimised model under `torch.compile`, forward and backward."""
    import attnopt

    torch.manual_seed(0)
    model = Layer().to(device, _DTYPE[device])
    x, grad = (torch.randn(2, 333, 256, device=device, dtype=_DTYPE[device]) for _ in range(2))

    def run() -> Result:
        fast = attnopt.optimize(model, (x,), validate=False)
        (site,) = fast.report.sites
        called = torch.compile(fast, mode=mode)
        for _ in range(3):  # recorded in the second call, replayed in the third
            found = _outputs(called, x, grad)
        golden, eager = _outputs(Layer().to(device).double(), x, grad, model), _outputs(model, x, grad)
        verdicts = [
            compare(*three, gradients=True, elementary=True) for three in zip(golden, eager, found, strict=True)
        ]
        wrong = [str(v) for v in verdicts if not v.ok]
        return {"ok": site.status == "fused" and not wrong, "note": f"{site.status}: {'; '.join(wrong) or verdicts[0]}"}

    return _told(run)


def _outputs(model: Any, x: Tensor, grad: Tensor, weights: torch.nn.Module | None = None) -> list[Tensor]:
    """The result and the gradient of `x`."""
    if weights is not None:
        model.load_state_dict(weights.state_dict())
        x, grad = x.double(), grad.double()
    leaf = x.detach().clone().requires_grad_()
    out = model(leaf)
    out.backward(grad)
    assert leaf.grad is not None
    return [out.detach().clone(), leaf.grad.clone()]


def ahead(chip: Chip, device: str) -> Result:
    """Machine code that was compiled ahead of time, written to a folder, read, restored and launched: of few rows and
    many, and of their gradients.
    """
    from attnopt.aot.build import build as built
    from attnopt.runtime.triton_binaries import write
    from attnopt.runtime.triton_launch import build

    spec = replace(dict(standard(_HEADS))["alibi"], returns=("lse",)).canonical()
    layout, kinds = layout_for(spec, "bfloat16"), ("forward", "decode", "backward")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), built([("alibi", spec)], [chip], "bfloat16", lambda text: None, kinds))
        backend = build(spec, layout, chip, Options(aot_dir=folder))
    kernels, said = Kernels(spec, layout, chip, (), ahead=backend.ahead), []
    for n_q, n_k in ((1, 8192), (333, 333)):
        q, k, v, *captures = usual_inputs(spec, 1, n_q, n_k, torch.bfloat16, device)
        out, lse = backend(q, k, v, captures, ())
        verdict = check_rows(spec, (q, k, v), captures, (), out, lse)
        said += [] if verdict.ok else [str(verdict)]
    grad, needs = torch.randn_like(out), [True] * 3 + [False] * len(captures)
    found = kernels.run(grad, None, (q, k, v, *captures), (), kernels.backward, (out, lse))
    said += [x for x in [objection(spec, grad, None, (q, k, v, *captures), (), needs, found)] if x]
    ready = [x for module in backend.ahead.modules.values() for x in vars(module).values() if isinstance(x, Ready)]
    used = sorted(x.binary.entry.removeprefix("attention_") for x in ready if x.restored and not x.problem)
    said += [x.problem or f"{x.binary.entry} was not launched" for x in ready if x.problem or not x.restored]
    return {"ok": len(used) == 6 and not said, "note": f"{', '.join(used)}; {'; '.join(said) or 'agreed'}"}


def products(chip: Chip, device: str) -> Result:
    """Products of fp32 elements in three products of TF32 parts, which kernels take here, and as IEEE says."""
    spec = dict(standard(_HEADS))["causal"]
    tensors = q, k, v = usual_inputs(spec, 1, 300, 1200, torch.float32, device)
    plan, verdicts = fitting(spec, chip, "float32", "forward")[-1], {}
    for way in ("tf32x3", "ieee"):
        kernel = triton.emit(spec, layout_for(spec, "float32"), replace(plan, fp32=way))
        out, lse = launch([kernel], tuple(tensors), {})
        verdicts[way] = check_rows(spec, (q, k, v), (), (), out, lse)
    return {"ok": verdicts[chip.fp32].ok, "note": "; ".join(f"{way} {v}" for way, v in verdicts.items())}


# By kind of check.
PATHS: dict[str, Callable[[Chip, str], Result]] = {
    "select topk": lambda chip, device: select(chip, device, "topk"),
    "select mass": lambda chip, device: select(chip, device, "mass"),
    "select padded": lambda chip, device: select(chip, device, "topk", padded=True),
    "listed": listed,
    "decay by head": lambda chip, device: decays(chip, device, "head"),
    "decay by token": lambda chip, device: decays(chip, device, "token"),
    "graph": graph,
    "compiled": lambda chip, device: compiled(chip, device, None),
    "compiled graphs": lambda chip, device: compiled(chip, device, "reduce-overhead"),
    "ahead of time": ahead,
    "products of fp32": products,
}
