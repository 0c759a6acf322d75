"""Runs generated Triton kernels under Triton's interpreter, in a process of its own: reads jobs, writes verdicts.

The interpreter has to be chosen before Triton is imported, and must not be seen by other tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import torch

from attnopt.codegen import triton
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.runtime.native import layout_of
from attnopt.codegen.cpp_loads import k_axes
from attnopt.runtime.triton_load import load
from tests.conformance.judge import judge, tensors
from tests.specs import Sizes, case

torch.set_num_threads(1)


def poison() -> None:
    """Fresh memory holds NaN, so that what a kernel leaves unwritten is seen."""
    fresh = torch.Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return fresh(*args, **kwargs).fill_(torch.nan)

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign]


def forward(job: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one case at one size, layout, dtype and plan."""
    item = case(job["case"])
    dtype = getattr(torch, job["dtype"])
    batch, n_q, n_k = job["sizes"]
    inputs = tensors(item.spec, batch, n_q, n_k, job.get("layout", "contiguous"), dtype, job.get("size", 1.0))
    captures = item.captures(Sizes(batch, item.spec.heads.q, n_q, n_k), torch.Generator().manual_seed(1))
    spec = item.spec.canonical()
    kernel = triton.emit(spec, layout_of(k_axes(spec), inputs[0], captures), TritonPlan(*job["plan"]))
    result = load(kernel).attention(*inputs, *captures, *item.scalars)
    verdict = judge(spec, inputs, captures, item.scalars, result)
    return {**job, "ok": verdict.ok, "verdict": str(verdict)}


KINDS = {"forward": forward}


def main(jobs: Sequence[dict[str, Any]]) -> None:
    """One line of JSON for each job."""
    poison()
    for job in jobs:
        try:
            answer = KINDS[job.get("kind", "forward")](job)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            answer = {**job, "ok": False, "verdict": f"{type(cause).__name__}: {cause}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.load(sys.stdin))
