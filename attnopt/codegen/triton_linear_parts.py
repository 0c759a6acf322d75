"""What the kernels of a linear attention begin with: their arguments, their place in the grid, where tensors begin."""

from __future__ import annotations

import textwrap

# Tensors whose strides are known where they are made: one row of numbers or one state after another.
_PACKED = ("states", "later", "dtotal", "total", "drate")
# The head that a kernel reads or writes of a tensor, where that is not its query head.
_HEADS = {"k": "key_head(h)", "v": "value_head(h)"}
_INDENT = " " * 4
Places = tuple[tuple[str, str], ...]


def strided(tensors: str) -> list[str]:
    """The tensors of a kernel that come with strides, in order."""
    return [name for name in tensors.split() if name not in _PACKED]


def kernel(
    name: str, about: str, tensors: str, sizes: str, body: str, places: Places = (("segment", "segments"),)
) -> str:
    """A kernel that goes through one segment of one head.

    Args:
        name: of the kernel.
        about: its documentation.
        tensors: names, apart by spaces; each is a pointer, and has strides unless they are known.
        sizes: names of the integers.
        body: what follows once `segment`, `h`, `b`, the head's `rate` and `X_base` of each tensor are known.
        places: what the grid counts within a head, each with its extent, the one that moves fastest first.
    """
    names, given = tensors.split(), sizes.split()
    lines = [
        f"@triton.jit(do_not_specialize={given})",
        f"def {name}(",
        *_wrapped([f"{x}_ptr" for x in names]),
        *_wrapped(given),
        *(f"{_INDENT}{', '.join(f'{x}_stride{i}' for i in range(_rank(x)))}," for x in strided(tensors)),
        "):",
        f'{_INDENT}"""{about}"""',
        *(f"{_INDENT}{line}" for line in [*_grid(places), *_bases(names)]),
        textwrap.indent(textwrap.dedent(body).strip("\n"), _INDENT),
    ]
    return "\n".join(lines) + "\n"


def _rank(tensor: str) -> int:
    return 2 if tensor == "rate" else 3


def _wrapped(names: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(names) + ",", 112, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _grid(places: Places) -> list[str]:
    lines, rest = [], "tl.program_id(0)"
    for place, extent in places:
        lines.append(f"{place} = {rest} % {extent}")
        rest = f"{rest} // {extent}"
    return [*lines, f"h = {rest} % HEADS", f"b = {rest} // HEADS"]


def _bases(names: list[str]) -> list[str]:
    lines = []
    for name in names:
        if name == "rate":
            lines.append("rate = rate_of(rate_ptr, rate_stride0, rate_stride1, b, h)")
        elif name in ("dtotal", "total"):
            lines.append(f"{name}_base = {name}_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_q")
        elif name not in _PACKED:
            head = _HEADS.get(name, "h")
            lines.append(f"{name}_base = base({name}_ptr, {name}_stride0, {name}_stride1, b, {head})")
    return lines
