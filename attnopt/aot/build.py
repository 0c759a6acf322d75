"""Specs compiled for chips that need not be here: the first plan that fits, with what the compiler said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from attnopt.aot.standard import layout_for
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_kinds import EMIT, missing, proposed
from attnopt.codegen.triton_plans import Chip
from attnopt.errors import CompileError, SpecError
from attnopt.runtime.cpp_gradient import with_lse
from attnopt.runtime.triton_compile import PRODUCTS, Compiled, compile_entry
from attnopt.spec import AttentionSpec

Built = tuple[str, AttentionSpec, TritonKernel, Compiled]


def build(
    specs: Iterable[tuple[str, AttentionSpec]],
    chips: Iterable[Chip],
    dtype: str,
    say: Callable[[str], None],
    kinds: Iterable[str] = ("forward",),
    page: int = 0,
) -> Iterator[Built]:
    """Every spec for every chip. Raises `CompileError` for one that no plan fits; says which lack a kind.

    `page`: keys and values stand in pages of so many.
    """
    chips, kinds = tuple(chips), tuple(kinds)
    for name, given in specs:
        for kind, spec in variants(given, kinds):
            layout = replace(layout_for(spec, dtype), page=page)
            reason = missing(kind, spec, layout)
            if reason is not None:
                say(f"{name:<20} no {kind}: {reason}")
                continue
            for chip in chips:
                kernel, compiled = compile_spec(spec, chip, dtype, kind, page)
                for made in compiled:
                    say(line(name, kernel, made))
                    yield name, spec, kernel, made


def variants(spec: AttentionSpec, kinds: Iterable[str]) -> Iterator[tuple[str, AttentionSpec]]:
    """Each kind, with the spec as it is launched: gradients start from the lse, and so does the forward before them."""
    kinds = tuple(dict.fromkeys(kinds))
    for kind in kinds:
        if kind == "backward":
            yield kind, replace(spec, returns=("lse",))
            continue
        yield kind, spec
        recorded = AttentionSpec.parse(with_lse(spec.text))
        if kind == "forward" and "backward" in kinds and recorded.key != spec.key:
            yield kind, recorded


def compile_spec(
    spec: AttentionSpec, chip: Chip, dtype: str, kind: str = "forward", page: int = 0
) -> tuple[TritonKernel, list[Compiled]]:
    """The kernels of the first plan that fits the chip. Raises `CompileError` if none does or there is no kernel."""
    layout, problem = replace(layout_for(spec, dtype), page=page), "no plan for heads this wide fits it"
    for plan in proposed(kind, spec, chip, dtype):
        try:
            kernel = EMIT[kind](spec, layout, plan)
        except SpecError as error:
            raise CompileError(str(error)) from error
        try:
            compiled = [compile_entry(kernel, entry, chip) for entry in kernel.entries]
        except CompileError as error:
            problem = str(error).rstrip(".")
            continue
        problems = [made.problem for made in compiled if made.problem is not None]
        if not problems:
            return kernel, compiled
        problem = problems[0]
    raise CompileError(f"{spec} has no kernel for {chip.name}: {problem}.")


def line(name: str, kernel: TritonKernel, made: Compiled) -> str:
    """One row of the table: what the kernel takes, and whether its products run on tensor cores."""
    product = PRODUCTS[made.chip.name]
    count = made.instructions.get(product, 0)
    other = sum(made.instructions.get(x, 0) for x in set(PRODUCTS.values()) - {product})
    waits = made.instructions.get("cp.async", 0)
    return (
        f"{name:<20} {made.entry.removeprefix('attention_'):<8} {made.chip.name:<7} {kernel.plan!s:<48} "
        f"{made.shared / 1024:6.1f} KiB shared, "
        f"{_or(made.registers)} registers, {_or(made.spills)} spilled, {count} {product}"
        f"{f', {other} other products' if other else ''}{f', {waits} cp.async' if waits else ''}"
    )


def _or(number: int | None) -> str:
    return "?" if number is None else str(number)
