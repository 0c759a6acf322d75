"""`attnopt tune`: measure the plans of the usual attentions on the GPU that is here, and keep the fastest."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attnopt.codegen.triton_cost import Problem
from attnopt.codegen.triton_parts import ELEMENTS
from attnopt.errors import OptionError
from attnopt.options import Options
from attnopt.spec import AttentionSpec, Heads

# Batch, queries, keys.
_SIZES = {"forward": ((4, 4096, 4096),), "decode": ((8, 1, 32768),), "backward": ((4, 4096, 4096),)}


def register(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser("tune", help="measure the plans of Triton kernels on this GPU and keep the fastest")
    command.add_argument("--only", action="append", metavar="NAME", help="only this usual attention; may be repeated")
    command.add_argument("--kind", action="append", choices=sorted(_SIZES), help="may be repeated (all)")
    command.add_argument("--dtype", choices=sorted(ELEMENTS), default="bfloat16", help="of q, k and v (bfloat16)")
    command.add_argument("--width", type=int, action="append", help="of a head; may be repeated (64, 128)")
    command.add_argument("--sizes", metavar="B,NQ,NK", help="batch, queries and keys (4,4096,4096; decode 8,1,32768)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a line for each choice. Raises `OptionError` where there is no GPU or a name is unknown."""
    import torch

    if not torch.cuda.is_available():
        raise OptionError("there is no GPU here; plans are measured on the chip that they are for.")
    from attnopt.runtime.triton_launch import chip_of

    options, chip = replace(Options.make(), tune=True), chip_of(torch.device("cuda"))
    for name, spec in specs(arguments.only, arguments.width or [64, 128]):
        for kind in arguments.kind or _SIZES:
            for batch, n_q, n_k in sizes(arguments.sizes) or _SIZES[kind]:
                plan = tune(spec, arguments.dtype, chip, kind, Problem(batch, n_q, n_k), options)
                width = spec.heads.d_qk
                print(f"{name:<20} {kind:<9} D={width:<4} {batch} x {n_q} x {n_k}: {plan or 'the default'}", flush=True)
    return 0


def specs(only: list[str] | None, widths: list[int]) -> Iterator[tuple[str, AttentionSpec]]:
    """The usual attentions, 2048 wide in all, or those of these names. Raises `OptionError` for an unknown name."""
    from attnopt.aot.standard import standard

    known = [name for name, _ in standard()]
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise OptionError(f"no usual spec is called {', '.join(unknown)}; choose from {', '.join(known)}.")
    for width in widths:
        if not 1 <= width <= 256:
            raise OptionError(f"--width {width}: heads of 1 to 256 have kernels.")
        count = max(1, 2048 // width)
        for name, spec in standard(Heads(count, count, count, width, width)):
            if not only or name in only:
                yield name, spec


def sizes(text: str | None) -> tuple[tuple[int, int, int], ...]:
    """`B,NQ,NK` as numbers; empty for None. Raises `OptionError`."""
    if text is None:
        return ()
    parts = text.split(",")
    if len(parts) != 3 or not all(x.strip().isdecimal() and int(x) for x in parts):
        raise OptionError(f"--sizes {text!r} must be three positive integers: batch, queries, keys.")
    return ((int(parts[0]), int(parts[1]), int(parts[2])),)


def tune(
    spec: AttentionSpec, dtype: str, chip: Any, kind: str, problem: Problem, options: Options, device: str = "cuda"
) -> Any:
    """The fastest plan, measured now unless it was before; None where there is no kernel or none could be measured."""
    import torch

    from attnopt.aot.inputs import usual_inputs
    from attnopt.aot.standard import layout_for
    from attnopt.codegen.triton import supports_backward
    from attnopt.runtime.triton_call import device_name
    from attnopt.runtime.triton_gradient import Kernels
    from attnopt.runtime.triton_launch import build
    from attnopt.runtime.triton_tune import Tuner

    layout = layout_for(spec, dtype)
    tensors = usual_inputs(spec, problem.batch, problem.n_q, problem.n_k, getattr(torch, dtype), device)
    if kind == "backward":
        if supports_backward(spec, layout):
            return None
        wanted = replace(spec, returns=("lse",))
        kernels = Kernels(wanted, layout, chip, (), Tuner(wanted, dtype, chip, options))
        return kernels.prepare(torch.randn_like(tensors[0]), None, tensors, ())[0].plan
    backend = build(spec, layout, chip, options)
    q, k, v, *captures = tensors
    if backend.kind(q, k) != kind:
        return None
    backend(q, k, v, captures, ())
    return backend.tuner and backend.tuner.plan(kind, problem, device=device_name(q.device))
