"""Triton kernels: readable files, generated for a spec, a layout and a plan, that run alone.

Each file holds the kernel, the functions it calls and `attention(q, k, v, captures..., scalars...)`, which launches it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from attnopt._version import VERSION
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_backward import backward, undifferentiable
from attnopt.codegen.triton_decode import decode
from attnopt.codegen.triton_dialect import helpers, triton_float
from attnopt.codegen.triton_forward import VISITED, Argument, block_width, forward, listing
from attnopt.codegen.triton_gather import gathers
from attnopt.codegen.triton_launchers import backward_launcher, decode_launcher, forward_launcher
from attnopt.codegen.triton_loads import TRITON_TYPES
from attnopt.codegen.triton_pages import unsupported
from attnopt.codegen.triton_parts import ELEMENTS, folded_scale, parts
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.errors import SpecError
from attnopt.returns import PAIRS
from attnopt.spec import AttentionSpec, EmptyRow, Mixed, Softmax

# The widest head that a tile holds.
_WIDEST = 256


@dataclass(frozen=True)
class Entry:
    """A kernel of a file: its name and its arguments in order."""

    name: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class TritonKernel:
    """Generated source with what it was generated from. `kind`: `forward`, `decode` or `backward`."""

    source: str
    spec_key: str
    layout: Layout
    plan: TritonPlan
    entries: tuple[Entry, ...]
    kind: str = "forward"

    @cached_property
    def key(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(f"triton\n{self.source}".encode()).hexdigest()


def supported(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why there is no Triton kernel for this spec and layout; None if there is one."""
    if spec.dropout:
        return "the Triton kernel has no dropout"
    if spec.select is not None or spec.merge or set(spec.returns) & set(PAIRS):
        return "the Triton kernel visits all keys that `keep` allows and returns one result"
    if isinstance(spec.normalizer, Mixed):
        return "no Triton kernel has a mixed normaliser; its two parts have one each"
    if spec.weight != 1 and spec.empty_row is EmptyRow.UNIFORM and isinstance(spec.normalizer, Softmax):
        return "the Triton kernel does not spread the weight of rows without keys where weights are changed afterwards"
    if layout.dtype not in ELEMENTS:
        return f"the Triton kernel has no {layout.dtype}; it has {', '.join(ELEMENTS)}"
    if max(spec.heads.d_qk, spec.heads.d_v) > _WIDEST:
        return f"the Triton kernel holds heads of up to {_WIDEST}; this one is {spec.heads.d_qk}/{spec.heads.d_v} wide"
    if len(layout.captures) != len(spec.captures):
        return f"the layout describes {len(layout.captures)} captures; the spec has {len(spec.captures)}"
    for capture, about in zip(spec.captures, layout.captures, strict=True):
        if about.dtype not in TRITON_TYPES:
            return f"the Triton kernel cannot load {capture.name} of dtype {about.dtype}"
    if VISITED in (*(c.name for c in spec.captures), *spec.scalars):
        return f"the Triton kernel cannot use {VISITED!r} as the name of a capture or scalar"
    try:
        parts(spec.canonical(), layout)
    except SpecError as error:
        return str(error)
    return unsupported(spec, layout)


def emit(spec: AttentionSpec, layout: Layout, plan: TritonPlan, source_note: str = "") -> TritonKernel:
    """The forward kernel of a spec. Raises `SpecError` where `supported` gives a reason.

    Args:
        spec: what to compute.
        layout: dtypes and unit strides to specialise for.
        plan: the schedule.
        source_note: where the site stands in the user's code, for the header.
    """
    reason = supported(spec, layout)
    if reason is not None:
        raise SpecError(f"{reason}.")
    spec = spec.canonical()
    body, given = forward(spec, layout, plan.listed, plan.block_n)
    entries = [Entry("attention_forward", tuple(given))]
    rows: list[Argument] = []
    if gathers(spec):
        first, rows = listing(spec, layout)
        body, entries = f"{first}\n\n\n{body}", [Entry("attention_rows", tuple(rows)), *entries]
    sections = [
        header(spec, layout, plan, source_note, "forward"),
        constants(spec, plan, body, layout.page),
        *helpers(body),
        body,
        forward_launcher(spec, given, plan.listed, rows, layout),
    ]
    return TritonKernel(
        "\n\n\n".join(s.strip("\n") for s in sections) + "\n",
        spec.key,
        layout,
        plan,
        tuple(entries),
    )


def emit_decode(spec: AttentionSpec, layout: Layout, plan: TritonPlan, source_note: str = "") -> TritonKernel:
    """The kernels for few queries and many keys: as `emit`, with the keys split among programs."""
    reason = supported(spec, layout)
    if reason is not None:
        raise SpecError(f"{reason}.")
    spec = spec.canonical()
    body, split, combine = decode(spec, layout, plan.block_n)
    sections = [
        header(spec, layout, plan, source_note, "decode"),
        constants(spec, plan, body, layout.page),
        *helpers(body),
        body,
        decode_launcher(spec, split, combine, layout),
    ]
    entries = Entry("attention_split", tuple(split)), Entry("attention_combine", tuple(combine))
    return TritonKernel(
        "\n\n\n".join(s.strip("\n") for s in sections) + "\n", spec.key, layout, plan, entries, "decode"
    )


def supports_backward(spec: AttentionSpec, layout: Layout, learned: Sequence[str] = ()) -> str | None:
    """Why there are no Triton kernels for the gradients of q, k, v and these captures; None if there are."""
    reason = supported(spec, layout) or undifferentiable(spec.canonical(), learned)
    if reason is not None:
        return reason
    if layout.page:
        return "the Triton kernel has no gradients of keys in pages"
    try:
        backward(spec.canonical(), layout, learned)
    except SpecError as error:
        return str(error)
    return None


def emit_backward(
    spec: AttentionSpec, layout: Layout, plan: TritonPlan, learned: Sequence[str] = (), source_note: str = ""
) -> TritonKernel:
    """The kernels of the gradients of q, k, v and the captures `learned`; as `emit` otherwise."""
    reason = supports_backward(spec, layout, learned)
    if reason is not None:
        raise SpecError(f"{reason.rstrip('.')}.")
    spec = spec.canonical()
    kernels = backward(spec, layout, learned)
    body = "\n\n\n".join(text for _, text, _ in kernels)
    sections = [
        header(spec, layout, plan, source_note, "backward"),
        constants(spec, plan, body, layout.page),
        *helpers(body),
        body,
        backward_launcher(spec, {name: given for name, _, given in kernels}, learned),
    ]
    entries = tuple(Entry(name, tuple(given)) for name, _, given in kernels)
    return TritonKernel(
        "\n\n\n".join(s.strip("\n") for s in sections) + "\n", spec.key, layout, plan, entries, "backward"
    )


# How the kernels of each kind are made.
EMIT: dict[str, Callable[[AttentionSpec, Layout, TritonPlan], TritonKernel]] = {
    "forward": emit,
    "decode": emit_decode,
    "backward": emit_backward,
}


def header(spec: AttentionSpec, layout: Layout, plan: TritonPlan, note: str, what: str) -> str:
    """What the file is, as its docstring, and its imports."""
    captures = ", ".join(
        f"{c.name}: {about.dtype}, k stride {'any' if about.k_stride is None else about.k_stride}"
        for c, about in zip(spec.captures, layout.captures, strict=bool(layout.captures))
    )
    lines = [
        f"Attention {what}, generated by attnopt {VERSION}.",
        "",
        f"spec    {spec}",
        f"key     {spec.key}",
        f"layout  {layout.dtype}{f'; pages of {layout.page} keys' if layout.page else ''}"
        f"{', and new ones' if layout.new else ''}"
        f"{'; ' + captures if captures else ''}",
        f"plan    {plan}{', fp32 products ' + plan.fp32 if layout.dtype == 'float32' else ''}",
        *([f"source  {note}"] if note else []),
    ]
    text = "\n".join(" ".join(x.split()) if x.startswith("source") else x for x in lines)
    text = text.replace("\\", "/").replace('"""', "'''")
    return f'"""{text}\n"""\n\nimport torch\nimport triton\nimport triton.language as tl'


def constants(spec: AttentionSpec, plan: TritonPlan, body: str, page: int = 0) -> str:
    """The numbers that the text mentions, and the launch options."""
    heads, scale = spec.heads, folded_scale(spec)
    log2e = 1.0 / math.log(2.0)
    values: list[tuple[str, object]] = [
        ("HEADS", heads.q),
        ("D_QK", heads.d_qk),
        ("D_V", heads.d_v),
        ("BLOCK_M", plan.block_m),
        ("BLOCK_N", plan.block_n),
        ("BLOCK_D", block_width(heads.d_qk)),
        ("BLOCK_DV", block_width(heads.d_v)),
        ("PAGE", page),
        ("LOG2E", triton_float(_fp32(log2e))),
        ("LN2", triton_float(_fp32(math.log(2.0)))),
        ("SCALE_LOG2E", triton_float(_fp32(float(scale) * log2e)) if scale is not None else 0),
        ("FP32", repr(plan.fp32)),
    ]
    lines = [f"{name} = tl.constexpr({value})" for name, value in values if re.search(rf"\b{name}\b", body)]
    options = f"OPTIONS = dict({', '.join(f'{name}={value}' for name, value in plan.options.items())})"
    return "\n".join([*lines, options])


def _fp32(value: float) -> float:
    import struct

    return float(struct.unpack("f", struct.pack("f", value))[0])
