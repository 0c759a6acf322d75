"""Linear attention whose decay is learned, by head or by token: results and gradients on the chip, against fp64."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.runtime import dispatch
from attnopt.runtime.gradient import expected
from attnopt.runtime.native import check_rows
from attnopt.runtime.op import attention
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise

_HEADS = Heads(4, 2, 2, 64, 64)
_LENGTH = 700
_DECAYS = {
    "head": (sp.exp(-ex.load("decay", ex.h) * (ex.q - ex.k)), (4,)),
    "token": (
        sp.exp(ex.load("decay", ex.b, ex.h, ex.q) - ex.load("decay", ex.b, ex.h, ex.k)),
        (None, 4, None),
    ),
}


def decayed(device: str, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """The verdict on one call with a decay of each `head` or `token`, and on its gradients, that of the decay too."""
    factor, shape = _DECAYS[kind]
    keep, captures = ex.k <= ex.q, (Capture("decay", "float", shape),)
    spec = AttentionSpec(_HEADS, ex.s * factor, keep, Pointwise(), captures=captures).canonical()
    draw = torch.Generator(device).manual_seed(0)
    shapes = ((2, 4, _LENGTH, 64), (2, 2, _LENGTH, 64), (2, 2, _LENGTH, 64))
    tensors = [torch.randn(s, generator=draw, device=device).to(dtype) for s in shapes]
    steps = torch.rand((2, 4, _LENGTH), generator=draw, device=device) / 4
    tensors.append(steps[0, :, 0].contiguous() if kind == "head" else -steps.cumsum(-1))
    leaves = [t.requires_grad_() for t in tensors]
    out, _ = attention(spec, *leaves[:3], leaves[3:])
    grad = torch.randn(out.shape, generator=draw, device=device).to(dtype)
    found = torch.autograd.grad(out, leaves, grad)
    q, k, v, decay = (t.detach() for t in leaves)
    verdict, used = check_rows(spec, (q, k, v), [decay], (), out.detach(), None), dispatch.kernel_used(spec.key)
    golden, eager = (expected(spec, grad, None, [q, k, v, decay], (), [True] * 4, x) for x in (torch.float64, dtype))
    verdicts = [compare(g, e, x, gradients=True) for g, e, x in zip(golden, eager, found, strict=True)]
    wrong = [f"d{name}: {x}" for name, x in zip(("q", "k", "v", "decay"), verdicts, strict=True) if not x.ok]
    return {"ok": verdict.ok and not wrong, "note": "; ".join([f"{used}: {verdict}", *wrong]), "used": used}
