"""Side outputs of rows in C++: what a tile adds to a row, how parts meet, what is stored.

Entropy is summed up as in Triton (`triton_rows`): `spent = sum p x` beside `sum p`, with `p = e^x` and `x` the distance
of a logit from the running maximum.
"""

from __future__ import annotations

from attnopt.returns import SKIPPED, of_rows
from attnopt.spec import AttentionSpec, EmptyRow

_FILL = {
    EmptyRow.ZERO: "0.0f",
    EmptyRow.NAN: "n_k > 0 ? NAN : 0.0f",
    EmptyRow.UNIFORM: "n_k > 0 ? logf(float(n_k)) : 0.0f",
}
_SPENT = {
    "GROW": "\n  store(t.grow + r, select(to_bool(next == old), VF{}, old - shift));",
    "GROW_ONE": "\n  t.grow[r] = old == -INFINITY || next == old ? 0.0f : old - next;",
    "SPENT_START": """
  // What was spent below a lower maximum; no logit is -inf where there is a weight.
  const float grow = t.grow[r], factor = t.scale[r];
  VF spent = factor == 0.0f ? VF{} : (load(t.spent + r * kLanes) + load(t.sum + r * kLanes) * grow) * factor;""",
    "SPENT_ADD": "\n    spent += select(to_bool(p != 0.0f), p * (load(x + j) - shift), VF{});",
    "SPENT_STORE": "\n  store(t.spent + r * kLanes, spent);",
    "SPENT_KEEP": "\n  part.size = sum_lanes(load(t.spent + r * kLanes));",
    "SPENT_JOIN": """
  const float here = mine == 0.0f ? 0.0f : (t.spent[r * kLanes] + (old - shift) * t.sum[r * kLanes]) * mine;
  t.spent[r * kLanes] = here + (other == 0.0f ? 0.0f : (part.size + (part.max - shift) * part.sum) * other);""",
}


def spends(spec: AttentionSpec) -> bool:
    """Whether rows keep the sum of `p log p`."""
    return "entropy" in spec.returns


def spent_holes(spec: AttentionSpec) -> dict[str, str]:
    """The holes of a softmax that concern it; each stands at the end of a line."""
    return _SPENT if spends(spec) else dict.fromkeys(_SPENT, "")


def stored(spec: AttentionSpec, lse: str) -> str:
    """The statements that store the side outputs of a row. `lse`: the text of that."""
    spent = "logf(sum) - sum_lanes(load(t.spent + r * kLanes)) / sum"
    made = {
        "lse": lse,
        "entropy": f"empty ? ({_FILL[spec.empty_row]}) : {spent}",
        "max": "empty ? -INFINITY : t.max[r]",
        "log_sum": "empty ? 0.0f : logf(sum)",
    }
    return "\n".join(_lines(spec, "(b * kHeads + h) * n_q + q", made, 2))


def skipped_row(spec: AttentionSpec) -> str:
    """The statements that store what a row has that is not computed."""
    made = {name: f"{value:.1f}f" for name, value in SKIPPED.items()}
    made |= {name: "-INFINITY" if value < 0 else "INFINITY" for name, value in SKIPPED.items() if abs(value) > 1}
    names = of_rows(spec.returns) or ("lse",)
    return "\n".join(_lines(spec, "item * a.n_q + q", {name: made[name] for name in names}, 4))


def _lines(spec: AttentionSpec, row: str, made: dict[str, str], width: int) -> list[str]:
    names = of_rows(spec.returns) or ("lse",)
    if len(names) == 1:
        return [f"{' ' * width}if (a.lse) a.lse[{row}] = {made[names[0]]};"]
    lines = [f"float* const known = a.lse + ({row}) * {len(names)};"]
    lines += [f"known[{i}] = {made[name]};" for i, name in enumerate(names)]
    return [f"{' ' * width}{line}" for line in ["if (a.lse) {", *(f"  {line}" for line in lines), "}"]]
