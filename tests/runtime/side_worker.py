"""Side outputs by Triton kernels through the operator, under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import warnings
from dataclasses import replace

import torch

from attnopt.observed import attention
from attnopt.options import Options
from attnopt.runtime.dispatch import AttnoptWarning, kernels, use
from attnopt.runtime.pairs import defined
from attnopt.runtime.reference import reference
from tests.conformance.judge import tensors
from tests.specs import Sizes, case

ALL = ("lse", "entropy", "column_mass", "weights")


def main() -> None:
    """Fails unless kernels ran, without a warning, and agree with fp64 to some roundings of fp32."""
    warnings.filterwarnings("error", category=AttnoptWarning)
    for name in ("entropy_sink", "entropy_uniform", "sigmoid"):
        item = case(name)
        q, k, v = tensors(item.spec, 2, 19, 23, "contiguous", torch.float32, 1.0)
        captures = item.captures(Sizes(2, item.spec.heads.q, 19, 23), torch.Generator().manual_seed(1))
        asked = ALL if name != "sigmoid" else ALL[2:]
        spec = replace(item.spec, returns=())
        with use(Options(kernel="triton")):
            found = attention(spec, q, k, v, captures, returns=asked)
            assert kernels(replace(spec, returns=(*asked[:-2], "max", "log_sum") if len(asked) > 2 else ())) == "triton"
        wide = [t.double() for t in (q, k, v)]
        out, rows = reference(replace(spec, returns=asked[:-2]), *wide, captures)
        golden = {"out": out, **{x: defined(spec, *wide[:2], captures, (), x) for x in asked[-2:]}}
        golden |= dict(zip(asked[:-2], rows.unbind(-1), strict=True)) if len(asked) > 2 else {}
        for x, want in golden.items():
            torch.testing.assert_close(
                getattr(found, x).double(), want, atol=2e-5, rtol=2e-5, msg=lambda m, x=x: f"{x}: {m}"
            )
    print("agreed")


if __name__ == "__main__":
    main()
