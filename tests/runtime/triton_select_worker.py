"""Choices of blocks by the Triton kernels under the interpreter, in a process of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import attnopt
from attnopt.analysis.chosen import lowered
from attnopt.codegen.triton_plans import CHIPS
from attnopt.runtime import dispatch
from attnopt.runtime.chosen import chosen
from attnopt.runtime.lists import Lists
from attnopt.runtime.native import check_rows
from attnopt.runtime.op import attention
from attnopt.runtime.triton_lists import Visits
from attnopt.runtime.triton_select import Chooser
from tests.conformance.triton_worker import poison, repair  # chooses the interpreter
from tests.runtime import test_chosen as known


def inputs(job: dict[str, Any]) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """The spec, q, k and v, and captures."""
    rows, keys = job["sizes"]
    keep = {} if job.get("causal", True) else {"keep": known.sp.true}
    spec = known._spec(known.SELECTS[job["case"]], pad=bool(job.get("pad")), **keep)
    qkv = [x.to(getattr(torch, job["dtype"])) for x in known._inputs(rows, keys)]
    if job.get("ties"):
        qkv = [torch.ones_like(x) for x in qkv]
    if job.get("nan"):
        qkv[1][0, 0, keys // 2] = torch.nan
    if job.get("strided"):
        qkv = [torch.stack([x, x], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    pad = torch.arange(keys) >= torch.tensor([[keys // 2], [0]])
    return spec, qkv, [pad] if job.get("pad") else []


def choice(job: dict[str, Any]) -> dict[str, Any]:
    """Whether the kernels choose as the definition in fp64 does, and list what they chose as torch does."""
    spec, (q, k, _), captures = inputs(job)
    found = Chooser(spec, job["dtype"], CHIPS["sm_90"])(q, k, captures, ())
    if job.get("nan"):
        expected = chosen(spec, q, k, captures)
    else:
        expected = known._by_hand(spec, q, k, captures[0] if captures else None)
    plain, given = lowered(spec), [*captures, found]
    lists = []
    for block in ((32, 16), (8, 32)):
        made = Lists(plain, block, ragged=True)
        written = Visits(plain, made)(q, k, given, ())
        if written is None:
            lists.append("none")
            continue
        wanted = made(q, k, given, ()).expand(q.shape[0], q.shape[1], -1, -1)
        counts = written[..., 1].long()
        same = torch.equal(written[..., :2], wanted[..., :2])
        inside = torch.arange(wanted.shape[-1] - 2) < counts[..., None]
        cut = written[..., 2 : wanted.shape[-1]]
        lists.append("same" if same and bool((cut == wanted[..., 2:])[inside].all()) else "differs")
    return {"wrong": int((found != expected).sum()), "all": found.numel(), "picked": int(found.sum()), "lists": lists}


def whole(job: dict[str, Any]) -> dict[str, Any]:
    """Attention under the choice, forward and backward, by the operator."""
    spec, qkv, captures = inputs(job)
    leaves = [x.clone().requires_grad_() for x in qkv]
    with dispatch.use(attnopt.Options(kernel="triton")) as used:
        out, _ = attention(spec, *leaves, captures)
        torch.autograd.grad(out.square().sum(), leaves)
        name, said = used.sites[spec.text].used, sorted(used.said)
    given = [*captures, chosen(spec, *qkv[:2], captures)]
    verdict = check_rows(lowered(spec), tuple(qkv), given, (), out.detach(), None, rows=out.shape[2])  # type: ignore[arg-type]
    return {"ok": verdict.ok, "verdict": str(verdict), "used": name, "said": said}


if __name__ == "__main__":
    poison()
    repair()
    for line in json.loads(sys.stdin.read()):
        print(json.dumps(whole(line) if line.get("whole") else choice(line)), flush=True)
