"""Side outputs of rows in Triton: what a tile adds to the state, how two states meet, what is stored.

Entropy is summed up online. With weights `p = e^x`, `x` the logit minus the running maximum, `u = sum p x` beside
`l = sum p`: `H = log l - u / l`. A maximum that grows by `g` makes `x - g` of every x: `u' = e^-g (u - g l)`.
"""

from __future__ import annotations

from attnopt.codegen.triton_text import full
from attnopt.returns import SKIPPED, of_rows
from attnopt.spec import AttentionSpec, EmptyRow

# Names of the side outputs in the text.
_NAMES = {"lse": "lse", "entropy": "entropy", "max": "row_max", "log_sum": "log_sum"}
_FILL = {
    EmptyRow.ZERO: "0.0",
    EmptyRow.NAN: 'float("nan")',
    EmptyRow.UNIFORM: f"tl.log({full('0.0')} + n_k)",
}


def state_of(spec: AttentionSpec) -> tuple[str, ...]:
    """What a softmax keeps of a row: the maximum, the sum, and for an entropy the sum of `p log p`."""
    return ("m", "l", "u") if "entropy" in spec.returns else ("m", "l")


def spent(spec: AttentionSpec, away: str) -> list[str]:
    """The statement that updates `u`, before that of `l`, from the distances `away` from the new maximum."""
    if "entropy" not in spec.returns:
        return []
    now = f"tl.sum(tl.where(p == 0.0, 0.0, p * ({away})), 1, keep_dims=True)"
    return [f"u = tl.where(decay == 0.0, 0.0, (u + (m - shift) * l) * decay) + {now}"]


def spent_apart(spec: AttentionSpec) -> list[str]:
    """The same where the state of other keys joins, of the factor `weight`."""
    if "entropy" not in spec.returns:
        return []
    parts = (
        f"tl.where({factor} == 0.0, 0.0, (u{of} + (m{of} - shift) * l{of}) * {factor})"
        for of, factor in (("", "decay"), ("_part", "weight"))
    )
    return [f"u = {' + '.join(parts)}"]


def logged(spec: AttentionSpec, log: str, folded: bool) -> list[str]:
    """Statements that make the side outputs of the state. `log`: the text of lse; `folded`: all is in base 2."""
    count, sums = "tl.where(empty, 1.0, l)", "tl.log2" if folded else "tl.log"
    unit = " * LN2" if folded else ""
    made = {
        "lse": log,
        "entropy": f"tl.where(empty, {_FILL[spec.empty_row]}, ({sums}({count}) - u / {count}){unit})",
        "max": f"m{unit}",
        "log_sum": f"{sums}({count}){unit}",
    }
    return [f"{_NAMES[name]} = {made[name]}" for name in of_rows(spec.returns)]


def stored(spec: AttentionSpec, row: str, mask: str) -> list[str]:
    """Statements that store them; `row`: the number of a row among all."""
    names = of_rows(spec.returns)
    return [f"tl.store({_at(row, len(names), i)}, {_NAMES[name]}, mask={mask})" for i, name in enumerate(names)]


def _at(row: str, count: int, place: int) -> str:
    return f"lse_ptr + {row}" if count == 1 else f"lse_ptr + ({row}) * {count} + {place}"


def _left_out(name: str) -> str:
    value = SKIPPED[name]
    return repr(value) if abs(value) != float("inf") else f'float("{value}")'


def left_out(spec: AttentionSpec, row: str, mask: str) -> list[str]:
    """Statements that store what rows have that are not computed."""
    names = of_rows(spec.returns)
    return [
        f"tl.store({_at(row, len(names), i)}, tl.full([BLOCK_M, 1], {_left_out(name)}, tl.float32), mask={mask})"
        for i, name in enumerate(names)
    ]


def replaced(spec: AttentionSpec) -> list[str]:
    """Statements that give rows that are not `wanted` what such rows have."""
    return [f"{_NAMES[name]} = tl.where(wanted, {_NAMES[name]}, {_left_out(name)})" for name in of_rows(spec.returns)]


def launched(spec: AttentionSpec) -> tuple[list[str], str]:
    """The launcher's statement that makes room for them, and the name of what it returns beside the result."""
    count = len(of_rows(spec.returns))
    if not count:
        return [], "None"
    last = f", {count}" if count > 1 else ""
    return [f"lse = q.new_empty((batch, heads, n_q{last}), dtype=torch.float32)"], "lse"


def described(spec: AttentionSpec) -> str:
    """What a launcher says that it returns beside the result."""
    names, heads = of_rows(spec.returns), spec.heads.q
    if names in ((), ("lse",)):
        return f"lse [B, {heads}, n_q] or None."
    return f"{', '.join(names)} [B, {heads}, n_q{f', {len(names)}' if len(names) > 1 else ''}]."
