"""Linear and mixed attentions by the operator under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

import attnopt
from attnopt.runtime import dispatch, linear_gradient, triton_linear
from attnopt.runtime.native import check_rows
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec
from tests.conformance.triton_worker import poison, repair  # chooses the interpreter
from tests.runtime import test_linear as plain
from tests.runtime import test_linear_native as shifted
from tests.runtime import test_mixed as beside

SPECS: dict[str, tuple[AttentionSpec, Any]] = {
    **{name: (given, plain.inputs) for name, given in shifted.SPECS.items()},
    **{f"mixed_{name}": (given, beside.inputs) for name, given in beside.SPECS.items()},
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What ran, the verdict on the result, and the largest errors of gradients relative to their largest values."""
    given, make = SPECS[job["case"]]
    dtype = getattr(torch, job["dtype"])
    qkv, captures = make(given, *job["sizes"], dtype)
    captures = [x.float() if x.is_floating_point() else x for x in captures]
    if job.get("break") == "forward":
        launch = triton_linear.TritonLinear._launch
        triton_linear.TritonLinear._launch = lambda *a, **m: tuple(x * 1.5 for x in launch(*a, **m))  # type: ignore[method-assign]
    if job.get("break") == "gradient":
        linear_gradient.TritonLinear.sums = lambda self, q, k, v, *a: (v.float().sum() * q.float(), q.float())  # type: ignore
    leaves = [x.clone().requires_grad_() for x in qkv]
    learned = [x.clone().requires_grad_(x.is_floating_point() and bool(job.get("learned"))) for x in captures]
    with dispatch.use(attnopt.Options(kernel="triton")) as used, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out, _ = attention(given, *leaves, learned)
        verdict = check_rows(given, tuple(qkv), captures, (), out.detach(), None, rows=out.shape[2])  # type: ignore[arg-type]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        wanted = [x for x in (*leaves, *learned) if x.requires_grad]
        found = torch.autograd.grad(out, wanted, weight, allow_unused=True)
        name = used.sites[given.text].used
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (*leaves, *learned)]
    golden = reference(
        given, *wide[:3], [w if w.requires_grad else x for w, x in zip(wide[3:], captures, strict=True)]
    )[0]
    exact = torch.autograd.grad(golden, [x for x in wide if x.requires_grad], weight.double(), allow_unused=True)
    errors = [
        float((f.double() - e).abs().max() / e.abs().max())
        for f, e in zip(found, exact, strict=True)
        if f is not None and e is not None
    ]
    warned = [str(x.message) for x in said if issubclass(x.category, dispatch.AttnoptWarning)]
    return {"ok": verdict.ok, "verdict": str(verdict), "used": name, "errors": errors, "said": warned}


if __name__ == "__main__":
    poison()
    repair()
    for line in json.loads(sys.stdin.read()):
        print(json.dumps(run(line)), flush=True)
