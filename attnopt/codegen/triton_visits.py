"""From ranges of keys to loops over their tiles: the function that a Triton kernel visits keys by, and its calls."""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.codegen.triton_parts import Parts
from attnopt.codegen.triton_text import indent

# The begin and end of a range of keys, and whether there is a mask.
Loop = tuple[str, str, bool]


def wrapped(names: Sequence[str], width: int = 100) -> list[str]:
    """Names by lines, each one with its comma."""
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) + 2 > width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{name},"
    return lines if names else []


def visit_function(name: str, state: Sequence[str], wanted: Sequence[str], body: Sequence[str]) -> str:
    """The loop over keys as a function."""
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}(",
            *indent([f"{', '.join(state)},", *wrapped(wanted[len(state) :]), "lo, hi, MASKED: tl.constexpr,"]),
            "):",
            '    """Keys [lo, hi) by tiles. Not MASKED: every query of the tile keeps every one of them."""',
            *indent(body),
            f"    return {', '.join(state)}",
        ]
    )


def split_ranges(made: Parts) -> list[str]:
    """From key ranges to tiles: `first, full_first, full_last, last`."""
    lo, hi, full_lo, full_hi = made.ends
    lines = [
        "# Keys that some query of the tile may keep, and those that every one keeps as far as positions decide.",
        f"first = {'0' if lo == '0' else f'({lo}) // BLOCK_N * BLOCK_N'}",
        f"last = tl.maximum({hi}, first)",
    ]
    if full_hi == "0":
        return lines
    if full_lo == "0":
        lines.append("full_first = first")
    else:
        lines.append(f"full_first = tl.minimum(tl.cdiv(tl.maximum({full_lo}, first), BLOCK_N) * BLOCK_N, last)")
    lines.append(f"full_last = tl.maximum(tl.minimum({full_hi}, last) // BLOCK_N * BLOCK_N, full_first)")
    return lines


def loops(made: Parts, first: str = "first", last: str = "last") -> list[Loop]:
    """Partial tiles, full ones, partial ones: those that can exist."""
    _, _, full_lo, full_hi = made.ends
    if full_hi == "0":
        return [(first, last, True)]
    found = [("full_first", "full_last", False), ("full_last", last, True)]
    return found if full_lo == "0" else [(first, "full_first", True), *found]


def visit_calls(
    found: Sequence[Loop], state: Sequence[str], wanted: Sequence[str], name: str = "visit_keys"
) -> list[str]:
    """A call of the function for every loop."""
    lines = []
    for begin, end, masked in found:
        given = [f"{', '.join(state)},", *wrapped(wanted[len(state) :]), f"{begin}, {end}, {masked},"]
        lines += [f"{', '.join(state)} = {name}(", *indent(given), ")"]
    return lines
