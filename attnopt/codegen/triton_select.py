"""The choice of blocks of a spec with `select` as a generated Triton file: `choose` and `visits`, which run alone."""

from __future__ import annotations

import re

from attnopt.codegen.base import Layout
from attnopt.codegen.triton import Entry, TritonKernel, header
from attnopt.codegen.triton_dialect import triton_float
from attnopt.codegen.triton_forward import Argument, block_width
from attnopt.codegen.triton_parts import ELEMENTS
from attnopt.codegen.triton_plans import Chip, TritonPlan
from attnopt.codegen.triton_select_skeleton import LAUNCH, SELECT
from attnopt.codegen.triton_text import head_map
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec

_WIDEST = 256
_ENTRIES = ("select_means", "select_scores", "select_choose", "select_list")
# The tensors of the kernels beside fp32 ones; the layout's dtype is that of `x`, which are queries or keys.
_TYPES = {"kept": "uint8", "chosen": "uint8", "classes": "int8", "own": "int32", "visited": "int32", "ranks": "int64"}


def supported_select(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why there is no Triton kernel for the choice of blocks; None if there is one."""
    heads, select = spec.heads, spec.select
    if select is None:
        return "the attention chooses no blocks"
    if layout.page:
        return "only the forward and decode kernels read keys in pages"
    if layout.dtype not in ELEMENTS:
        return f"the Triton kernel has no {layout.dtype}; it has {', '.join(ELEMENTS)}"
    if heads.d_qk > _WIDEST:
        return f"the Triton kernel pools heads of up to {_WIDEST}; this one is {heads.d_qk} wide"
    if select.shared and (heads.q % heads.k or heads.k_map != tuple(h // (heads.q // heads.k) for h in range(heads.q))):
        return "the Triton kernel has one run of query heads for each key head where they choose together"
    return None


def select_plans(chip: Chip, dtype: str, d_qk: int, d_v: int) -> tuple[TritonPlan, ...]:
    """The one schedule: [32, 32] tiles by blocks."""
    return (TritonPlan(32, 32, 8 if d_qk > 64 else 4, 2, chip.fp32),) if dtype in ELEMENTS and d_qk <= _WIDEST else ()


def emit_select(spec: AttentionSpec, layout: Layout, plan: TritonPlan, source_note: str = "") -> TritonKernel:
    """The kernels of a spec that chooses blocks. Raises `SpecError` where `supported_select` gives a reason."""
    reason = supported_select(spec, layout)
    if reason is not None:
        raise SpecError(f"{reason}.")
    spec, layout = spec.canonical(), Layout(layout.dtype)
    sections = [
        header(spec, layout, plan, source_note, "by chosen blocks: the choice"),
        _constants(spec, plan),
        _key_head(spec),
        SELECT,
        LAUNCH,
    ]
    entries = tuple(_entry(name, layout) for name in _ENTRIES)
    text = "\n\n\n".join(s.strip("\n") for s in sections) + "\n"
    return TritonKernel(text, spec.key, layout, plan, entries, "select")


def _key_head(spec: AttentionSpec) -> str:
    heads = spec.heads
    assert spec.select is not None
    code = "h" if spec.select.shared else head_map(heads.k_map, heads.k)
    about = '    """The key head of what chooses: a query head, or a group of them."""'
    return "\n".join(["@triton.jit", "def key_head(h):", about, f"    return {code}"])


def _constants(spec: AttentionSpec, plan: TritonPlan) -> str:
    heads, select = spec.heads, spec.select
    assert select is not None
    values = {
        "HEADS": heads.q,
        "KEYS": heads.k,
        "CHOOSERS": heads.k if select.shared else heads.q,
        "SHARED": heads.q // heads.k if select.shared else 1,
        "D": heads.d_qk,
        "BLOCK_D": block_width(heads.d_qk),
        "BLOCK": select.block,
        "TILE": select.tile,
        "FIRST": select.first,
        "MASS": select.rule == "mass",
        "SCALE": triton_float(float(select.scale)),
        "SIDE": plan.block_m,
        "CHUNK": 256,
        "ROWS": 32,
        "FP32": f"'{plan.fp32}'",
    }
    lines = [f"{name} = tl.constexpr({value})" for name, value in values.items()]
    options = f"OPTIONS = dict({', '.join(f'{name}={value}' for name, value in plan.options.items())})"
    return "\n".join([*lines, options])


def _entry(name: str, layout: Layout) -> Entry:
    """A kernel with its arguments as its text has them."""
    found = re.search(rf"def {name}\(\n(.*?)\n\):", SELECT, re.DOTALL)
    assert found is not None
    made = []
    for word in re.findall(r"\w+", found.group(1)):
        of = word.removesuffix("_ptr").split("_stride")[0]
        if word.endswith("_ptr"):
            made.append(Argument(word, layout.dtype if of == "x" else _TYPES.get(of, "float32"), of))
        else:
            made.append(Argument(word, "stride" if "_stride" in word else "size", of if "_stride" in word else ""))
    return Entry(name, tuple(made))
