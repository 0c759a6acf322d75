"""Time a token of linear attention from 1k to 64k tokens: forward and gradient, alone and beside a softmax window.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.linear [--runs 7] [--heads 1]

Head width 64, `elu` features as many, fp32; the mixed form has a window of 64 keys. All columns are timed in turns in
one process, lengths after one another in every turn: medians of CPU time, of which others on the machine take less.
Writes benchmarks/results/linear.json and linear.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.linearize.rewrite import linearized
from attnopt.runtime.linear import linear
from attnopt.runtime.op import attention
from attnopt.spec import AttentionSpec, Heads

RESULTS = Path(__file__).parent / "results"
LENGTHS = tuple(1024 << i for i in range(7))
WIDTH, WINDOW = 64, 64
SOFTMAX_MOST = 8192  # its time a token grows with the length: beyond that a row would take minutes
COLUMNS = (
    "causal", "causal, torch's operators", "causal, gradient", "window 64 and the rest", "the same, gradient",
    "all keys", "softmax, causal",
)  # fmt: skip


def specs(heads: int) -> dict[str, AttentionSpec]:
    """The linear attention that stands for a softmax attention of these heads: causal, with a window, over all keys."""
    softmax = AttentionSpec(Heads(heads, heads, heads, WIDTH, WIDTH), ex.number(WIDTH**-0.5) * ex.s, ex.q - ex.k >= 0)
    found = {
        "causal": linearized(softmax, WIDTH, True),
        "window": linearized(softmax, WIDTH, True, WINDOW),
        "all": linearized(AttentionSpec(softmax.heads, softmax.score), WIDTH, True),
    }
    return {name: spec for name, spec in found.items() if isinstance(spec, AttentionSpec)}


def runs(heads: int, length: int) -> dict[str, Callable[[], object]]:
    """What is timed at one length, by column."""
    made, draw = specs(heads), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, WIDTH, generator=draw) for _ in range(3))
    phi = [torch.nn.functional.elu(x) + 1 for x in (q, k)]
    wide = [torch.cat([x, y], -1) for x, y in zip((q, k), phi, strict=True)]
    form = linear_form(made["causal"])
    assert form is not None

    def gradient(spec: AttentionSpec, *given: Tensor) -> Callable[[], object]:
        leaves = [x.clone().requires_grad_() for x in (*given, v)]
        pull = torch.randn(v.shape, generator=draw)

        def run() -> object:
            out, _ = attention(spec, *leaves, [], [])
            return torch.autograd.grad(out, leaves, pull)

        return run

    found: dict[str, Callable[[], object]] = {
        "causal": lambda: attention(made["causal"], *phi, v, [], []),
        "causal, torch's operators": lambda: linear(made["causal"], form, *phi, v),
        "causal, gradient": gradient(made["causal"], *phi),
        "window 64 and the rest": lambda: attention(made["window"], *wide, v, [], []),
        "the same, gradient": gradient(made["window"], *wide),
        "all keys": lambda: attention(made["all"], *phi, v, [], []),
    }
    if length <= SOFTMAX_MOST:
        call = torch.nn.functional.scaled_dot_product_attention
        found["softmax, causal"] = lambda: call(q, k, v, is_causal=True)
    return found


def measured(heads: int, count: int) -> dict[str, dict[str, float]]:
    """Microseconds a token and head, by length and column; gradients with their forward."""
    times: dict[tuple[int, str], list[float]] = {}
    for turn in range(count + 1):
        for length in LENGTHS:
            for name, run in runs(heads, length).items():
                with torch.set_grad_enabled("gradient" in name):
                    started = time.process_time()
                    run()
                if turn:  # the first one builds kernels
                    times.setdefault((length, name), []).append(time.process_time() - started)
        print(f"turn {turn} of {count}", flush=True)
    found: dict[str, dict[str, float]] = {str(length): {} for length in LENGTHS}
    for (length, name), seen in times.items():
        found[str(length)][name] = round(1e6 * statistics.median(seen) / (heads * length), 3)
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown, and how flat each column is."""
    lines = ["| tokens | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for length, row in rows.items():
        cells = (f"{row[name]:.2f}" if name in row else "–" for name in COLUMNS)
        lines.append(f"| {int(length):,} | " + " | ".join(cells) + " |")
    first, last = next(iter(rows.values())), list(rows.values())[-1]
    lines.append(
        "| last / first | " + " | ".join(f"{last[n] / first[n]:.2f}" if n in last else "–" for n in COLUMNS) + " |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--heads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(asked.heads, asked.runs)
    (RESULTS / "linear.json").write_text(json.dumps({"heads": asked.heads, "rows": rows}, indent=1) + "\n")
    head = "# Linear attention: microseconds a token and head\n\n"
    head += "`python -m benchmarks.linear`: CPU time of one thread, fp32.\n\n"
    (RESULTS / "linear.md").write_text(head + table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
