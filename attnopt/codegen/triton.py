"""Triton kernels: readable files, generated for a spec, a layout and a plan, that run alone.

Each file holds the kernel, the functions it calls and `attention(q, k, v, captures..., scalars...)`, which launches it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from attnopt._version import VERSION
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.triton_decode import decode, group
from attnopt.codegen.triton_dialect import helpers, triton_float
from attnopt.codegen.triton_forward import Argument, block_width, forward
from attnopt.codegen.triton_loads import TRITON_TYPES
from attnopt.codegen.triton_parts import ELEMENTS, folded_scale, parts, row_ends
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, EmptyRow, Softmax

# The widest head that a tile holds.
_WIDEST = 256


@dataclass(frozen=True)
class Entry:
    """A kernel of a file: its name and its arguments in order."""

    name: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class TritonKernel:
    """Generated source with what it was generated from."""

    source: str
    spec_key: str
    layout: Layout
    plan: TritonPlan
    entries: tuple[Entry, ...]

    @cached_property
    def key(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(f"triton\n{self.source}".encode()).hexdigest()


def supported(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why there is no Triton kernel for this spec and layout; None if there is one."""
    if spec.dropout:
        return "the Triton kernel has no dropout"
    if spec.select is not None or spec.merge:
        return "the Triton kernel visits all keys that `keep` allows and returns one result"
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
    try:
        parts(spec.canonical(), layout)
    except SpecError as error:
        return str(error)
    return None


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
    body, given = forward(spec, layout)
    sections = [
        header(spec, layout, plan, source_note, "forward"),
        constants(spec, plan, body),
        *helpers(body),
        body,
        _launcher(spec, given),
    ]
    return TritonKernel(
        "\n\n\n".join(s.strip("\n") for s in sections) + "\n",
        spec.key,
        layout,
        plan,
        (Entry("attention_forward", tuple(given)),),
    )


def emit_decode(spec: AttentionSpec, layout: Layout, plan: TritonPlan, source_note: str = "") -> TritonKernel:
    """The kernels for few queries and many keys: as `emit`, with the keys split among programs."""
    reason = supported(spec, layout)
    if reason is not None:
        raise SpecError(f"{reason}.")
    spec = spec.canonical()
    body, split, combine = decode(spec, layout)
    sections = [
        header(spec, layout, plan, source_note, "decode"),
        constants(spec, plan, body),
        *helpers(body),
        body,
        _decode_launcher(spec, split, combine),
    ]
    entries = Entry("attention_split", tuple(split)), Entry("attention_combine", tuple(combine))
    return TritonKernel("\n\n\n".join(s.strip("\n") for s in sections) + "\n", spec.key, layout, plan, entries)


def header(spec: AttentionSpec, layout: Layout, plan: TritonPlan, note: str, what: str) -> str:
    """What the file is, as its docstring, and its imports."""
    captures = ", ".join(
        f"{c.name}: {about.dtype}, k stride {'any' if about.k_stride is None else about.k_stride}"
        for c, about in zip(spec.captures, layout.captures, strict=True)
    )
    lines = [
        f"Attention {what}, generated by attnopt {VERSION}.",
        "",
        f"spec    {spec}",
        f"key     {spec.key}",
        f"layout  {layout.dtype}{'; ' + captures if captures else ''}",
        f"plan    {plan}{', fp32 products ' + plan.fp32 if layout.dtype == 'float32' else ''}",
        *([f"source  {note}"] if note else []),
    ]
    text = "\n".join(" ".join(x.split()) if x.startswith("source") else x for x in lines)
    text = text.replace("\\", "/").replace('"""', "'''")
    return f'"""{text}\n"""\n\nimport torch\nimport triton\nimport triton.language as tl'


def constants(spec: AttentionSpec, plan: TritonPlan, body: str) -> str:
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
        ("LOG2E", triton_float(_fp32(log2e))),
        ("LN2", triton_float(_fp32(math.log(2.0)))),
        ("SCALE_LOG2E", triton_float(_fp32(float(scale) * log2e)) if scale is not None else 0),
        ("FP32", repr(plan.fp32)),
    ]
    lines = [f"{name} = tl.constexpr({value})" for name, value in values if re.search(rf"\b{name}\b", body)]
    options = f"OPTIONS = dict(num_warps={plan.warps}, num_stages={plan.stages}, enable_fp_fusion=True)"
    return "\n".join([*lines, options])


def _fp32(value: float) -> float:
    import struct

    return float(struct.unpack("f", struct.pack("f", value))[0])


def _launcher(spec: AttentionSpec, given: Sequence[Argument]) -> str:
    """The function that launches the kernel on tensors."""
    captures = [c.name for c in spec.captures]
    names = [*(f"{name}_tensor" for name in captures), *(f"{name}_value" for name in spec.scalars)]
    lse = "lse" in spec.returns
    made = ["batch, heads, n_q, _ = q.shape", "out = q.new_empty((batch, n_q, heads, v.shape[3])).transpose(1, 2)"]
    if lse:
        made.append("lse = q.new_empty((batch, heads, n_q), dtype=torch.float32)")
    made += [
        f"grid = (triton.cdiv(n_q, BLOCK_M.value) * batch * {spec.heads.q}, 1, 1)",
        "launch[grid](",
        *(f"    {line}" for line in launch_arguments(given, captures)),
        "    **(OPTIONS if launch is attention_forward else {}),",
        ")",
        f"return out, {'lse' if lse else 'None'}",
    ]
    return "\n".join(
        [
            f"def attention({', '.join(['q', 'k', 'v', *names])}, launch=attention_forward):",
            f'    """out [B, {spec.heads.q}, n_q, {spec.heads.d_v}], a view of a contiguous [B, n_q, {spec.heads.q}, '
            f"{spec.heads.d_v}], and lse [B, {spec.heads.q}, n_q] or None.",
            "",
            "    `launch`: the kernel, or one like it that was compiled before.",
            '    """',
            *(f"    {line}" for line in made),
        ]
    )


def _decode_launcher(spec: AttentionSpec, split: Sequence[Argument], combine: Sequence[Argument]) -> str:
    """The function that launches both kernels on tensors."""
    captures, packed, heads = [c.name for c in spec.captures], group(spec), spec.heads.q
    names = [*(f"{name}_tensor" for name in captures), *(f"{name}_value" for name in spec.scalars)]
    lse = "lse" in spec.returns
    count = len(row_ends(spec, Layout("float32", tuple(CaptureLayout("float32", None) for _ in captures))).state)
    lines = [
        "batch, heads, n_q, _ = q.shape",
        f"parts = batch * {heads // packed} * triton.cdiv({packed} * n_q, BLOCK_M.value)",
        "if splits is None:  # enough programs for every processor, and some keys for each",
        "    splits = max(1, min(2 * processors // parts, triton.cdiv(k.shape[2], BLOCK_N.value), 128))",
        "out = q.new_empty((batch, n_q, heads, v.shape[3])).transpose(1, 2)",
        *(["lse = q.new_empty((batch, heads, n_q), dtype=torch.float32)"] if lse else []),
        "sums = q.new_empty((batch * heads * n_q * splits, v.shape[3]), dtype=torch.float32)",
        f"state = q.new_empty((batch * heads * n_q * splits, {max(1, count)}), dtype=torch.float32)",
        "attention_split[(parts * splits, 1, 1)](",
        *(f"    {line}" for line in launch_arguments(split, captures)),
        "    **OPTIONS,",
        ")",
        f"attention_combine[(triton.cdiv(n_q, BLOCK_M.value) * batch * {heads}, 1, 1)](",
        *(f"    {line}" for line in launch_arguments(combine, captures)),
        "    **OPTIONS,",
        ")",
        f"return out, {'lse' if lse else 'None'}",
    ]
    return "\n".join(
        [
            f"def attention({', '.join(['q', 'k', 'v', *names])}, processors=132, splits=None):",
            f'    """out [B, {heads}, n_q, {spec.heads.d_v}], a view of a contiguous [B, n_q, {heads}, '
            f"{spec.heads.d_v}], and lse [B, {heads}, n_q] or None.",
            "",
            "    `processors`: how many the chip has; `splits`: how many programs share the keys of a row.",
            '    """',
            *(f"    {line}" for line in lines),
        ]
    )


def launch_arguments(given: Iterable[Argument], captures: Sequence[str]) -> list[str]:
    """The arguments of a call, by lines."""
    sizes = {"n_b": "batch", "n_q": "n_q", "n_k": "k.shape[2]", "n_splits": "splits"}
    groups: dict[str, list[str]] = {}
    for argument in given:
        tensor = f"{argument.of}_tensor" if argument.of in captures else argument.of
        if argument.kind == "stride":
            groups.setdefault("strides", [])
            if f"*{tensor}.stride()" not in groups["strides"]:
                groups["strides"].append(f"*{tensor}.stride()")
        elif argument.kind == "size":
            groups.setdefault("splits" if argument.of else "sizes", []).append(sizes[argument.name])
        elif argument.kind == "scalar":
            groups.setdefault("scalars", []).append(argument.name)
        else:
            groups.setdefault("pointers", []).append(tensor)
    return [f"{', '.join(names)}," for names in groups.values()]
