"""Attention over pages by the operator under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch

import attnopt
from attnopt import paged
from attnopt.runtime import dispatch, triton_paged
from attnopt.runtime.pages import gathered
from tests.conformance.judge import tensors
from tests.conformance.paged_inputs import paged as in_pages
from tests.conformance.triton_worker import poison, repair  # chooses the interpreter
from tests.runtime.test_pages import LAST, PADDED

SPECS = {"last": LAST, "padded": PADDED}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Which kernels ran, the largest difference to the definition, and what was said."""
    spec, launch = SPECS[job["spec"]], triton_paged.launch
    lengths, ran = job["lengths"], []
    n_new = job.get("new", 0)
    inputs = tensors(spec, len(lengths), job["n_q"], max(lengths) + n_new, "contiguous", torch.float32, 1.0)
    captures = (
        [torch.ones((len(lengths), job.get("pad", max(lengths) + n_new)), dtype=torch.int64)] if spec is PADDED else []
    )
    given = in_pages(inputs, lengths, job["page"], captures, n_new=n_new)
    new = dict(zip(("new_keys", "new_values"), given.new, strict=False))
    if "slots" in job:  # of the table, most of them unused
        more = torch.full((len(lengths), job["slots"] - given.page_table.shape[1]), -1, dtype=torch.int32)
        given = replace(given, page_table=torch.cat([given.page_table, more], 1))

    def watched(kernels: Any, *rest: Any, **more: Any) -> Any:
        ran.append(kernels[0].kind)
        out, lse = launch(kernels, *rest, **more)
        return out * job.get("factor", 1.0), lse

    triton_paged.launch = watched  # type: ignore[assignment]
    triton_paged._KNOWN.clear()
    with dispatch.use(attnopt.Options(kernel="triton")), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            found = paged.attention(
                spec, given.q, given.keys, given.values, given.page_table, given.key_lengths, captures, **new
            )
    triton_paged.launch = launch
    with dispatch.use(attnopt.Options(kernel="reference")):
        wanted = gathered(spec, given)
    errors = [float((x - y).nan_to_num(0).abs().max()) for x, y in zip(found, wanted, strict=True) if y.numel()]
    warned = [str(x.message) for x in said if issubclass(x.category, dispatch.AttnoptWarning)]
    return {"ran": ran, "errors": errors, "said": warned}


def main(jobs: list[dict[str, Any]]) -> None:
    """One line of JSON for each job."""
    poison()
    repair()
    for job in jobs:
        print(json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main(json.load(sys.stdin))
