"""Every spec of the list as a Triton kernel under Triton's interpreter, against fp64. `make triton` runs all sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.judge import LAYOUTS
from tests.conformance.triton_cases import everything

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))
DTYPES = ("float32", "bfloat16", "float16")
CASES = tuple(c.name for c in everything())
# Batch, queries, keys: one of each, more queries than keys, several tiles both ways, whole tiles, ragged ones.
SIZES = ((1, 1, 1), (2, 1, 33), (1, 37, 5), (1, 33, 90), (2, 32, 48), (1, 16, 16))
PLAN = (16, 16, 4, 2)


def verdicts(jobs: list[dict[str, Any]]) -> list[str]:
    """What failed, in words. The interpreter runs in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.triton_worker"],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=1200, env=environment, cwd=ROOT,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(jobs), done.stderr[-2000:]
    failed = [f"{a['case']} {a['dtype']} {a['sizes']}: {a['verdict']}" for a in answers if not a["ok"]]
    return [*failed, *(f"{a['case']} declined: {a['declined']}" for a in answers if "declined" in a)]


def job(
    case: str, dtype: str, sizes: tuple[int, int, int], plan: tuple[int, ...] = PLAN, **more: Any
) -> dict[str, Any]:
    return {"case": case, "dtype": dtype, "sizes": sizes, "plan": plan, **more}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_agrees_with_fp64(dtype: str) -> None:
    sizes = (2 if dtype == "float32" else 1, 19, 37)
    jobs = [job(name, dtype, sizes, layout=LAYOUTS[i % len(LAYOUTS)]) for i, name in enumerate(CASES)]
    assert not verdicts(jobs)


def test_sizes_layouts_and_plans() -> None:
    """A dozen of all combinations; every one of them under `make triton`."""
    jobs = [
        job(name, DTYPES[(i + j) % 3], sizes, ((16, 16, 4, 2), (32, 16, 4, 2), (16, 32, 4, 1))[j % 3],
            layout=LAYOUTS[(i + j) % 4])
        for i, name in enumerate(CASES)
        for j, sizes in enumerate(SIZES)
    ]  # fmt: skip
    assert not verdicts(jobs if ALL else jobs[:: len(jobs) // 12])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_agrees_with_its_keys_split(dtype: str) -> None:
    """Few queries and many keys; some splits are empty. A third of the cases for each dtype; all under `make triton`."""
    sizes, place = ((1, 1, 75), (2, 3, 40), (1, 5, 7)), DTYPES.index(dtype)
    jobs = [
        job(name, dtype, sizes[i % 3], kind="decode", splits=(3, 4, 2)[i % 3], size=0.5, layout=LAYOUTS[i % 4])
        for i, name in enumerate(CASES)
        if ALL or i % 3 == place
    ]
    assert not verdicts(jobs)


def test_positions_above_2048_and_huge_logits() -> None:
    jobs = [
        job("sigmoid_causal", "float16", (1, 2090, 2100), (256, 256, 4, 2)),
        job("alibi", "bfloat16", (1, 3, 2077), (16, 128, 4, 2)),
        job("plain", "float32", (2, 17, 65), size=60.0),
        job("additive_mask", "float32", (2, 17, 65), size=60.0),
        job("sink", "float32", (2, 17, 65), size=60.0),
    ]
    assert not verdicts(jobs)


# Why a case has no kernel with pages.
NO_PAGES = ("all rows are computed", "with pages there is no entropy", "with pages there is no max, log_sum")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_agrees_with_its_keys_in_pages(dtype: str) -> None:
    """Ragged lengths, one of them 0. A ninth of the cases for each dtype by one template; all under `make triton`."""
    sizes, place = ((3, 1, 40), (4, 5, 37), (2, 19, 33)), DTYPES.index(dtype)
    # Several pages a tile, pages that cut tiles, several tiles a page, a page for each key.
    jobs = [
        job(
            name,
            dtype,
            sizes[i // 3 % 3],
            kind=f"paged {kind}",
            page=(16, 5, 48, 1)[i // 9 % 4],
            splits=3,
            new=(0, 3)[i % 2],
        )
        for i, name in enumerate(CASES)
        for kind in ("forward", "decode")
        if ALL or (i % 9 == 3 * place + i // 9 % 3 and kind == ("forward", "decode")[(i + i // 9) % 2])
    ]
    found = verdicts(jobs)
    assert all(any(why in x for why in NO_PAGES) for x in found), found
    assert len(found) <= 3


# Why a case has no kernel for its gradients.
NO_GRADIENT = ("a divisor that is made from the weights",)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_agrees_with_fp64(dtype: str) -> None:
    """Of q, k, v, biases, tables and sinks. A third of the cases for each dtype; all under `make triton`."""
    place = DTYPES.index(dtype)
    chosen = [name for i, name in enumerate(CASES) if ALL or i % 3 == place]
    jobs = [job(name, dtype, (2, 19, 21), kind="backward", layout=LAYOUTS[i % 4]) for i, name in enumerate(chosen)]
    found = verdicts(jobs)
    assert all(any("declined" in f and x in f for x in NO_GRADIENT) for f in found), found
    assert len(found) < len(jobs) // 2


@pytest.mark.parametrize("name", ["column_mass", "weights"])
def test_side_outputs_of_pairs_agree_with_fp64(name: str) -> None:
    """A sixteenth of the cases for each; all under `make triton`."""
    sizes, place = ((2, 19, 37), (2, 37, 19), (1, 40, 5)), ("column_mass", "weights").index(name)
    jobs = [
        job(case, DTYPES[i % 3], sizes[i // 3 % 3], kind="side", name=name, layout=LAYOUTS[i % 4])
        for i, case in enumerate(CASES)
        if ALL or i % 16 == 8 * place or case in (("entropy_uniform",), ("entropy_sink", "entropy_absorbed"))[place]
    ]
    found = verdicts(jobs)
    assert all("whose divisor is made from them" in x for x in found), found
    assert len(found) <= len(jobs) // 3


def test_gradients_of_several_tiles_and_of_more_queries_than_keys() -> None:
    jobs = [
        job("window", "float32", (1, 50, 70), kind="backward"),
        job("causal", "bfloat16", (1, 33, 20), kind="backward"),
        job("prefix_or_window", "float16", (1, 70, 70), (32, 16, 4, 2), kind="backward"),
        job("empty_uniform", "float32", (2, 40, 17), (16, 32, 4, 2), kind="backward"),
        job("gqa_group_of_two", "float32", (1, 1, 7), kind="backward"),
    ]
    assert not verdicts(jobs)


def test_names_are_distinct() -> None:
    assert len(set(CASES)) == len(CASES)


# What is broken, the case it is broken in, the text of the kernel, what it becomes.
MUTATIONS = (
    ("drops the scale", "scale", "s * SCALE_LOG2E - shift", "s * 1.5 - shift"),
    ("causal is off by one", "causal", "(q >= k)", "(q > k)"),
    ("causal range ends early", "causal", "n_k, q1)", "n_k, q1 - 16)"),
    ("forgets the earlier sum", "scale", "l * decay + tl.sum", "tl.sum"),
    ("does not rescale", "scale", "acc = acc * decay", "acc = acc * 1.0"),
    ("masks no tail", "scale", "tl.where(valid, s", "tl.where(valid | True, s"),
    ("reads another head", "gqa", "key_head = h // 4", "key_head = h % 2"),
    ("treats a partial tile as full", "window", "full_last, last, True", "full_last, last, False"),
    ("forgets the sink", "sink", "1.0 + (m - m)", "0.0 * m"),
    ("drops the gate", "gate", "result * gain", "result * 1.0 # gain"),
    ("forgets delta", "backward:scale", "p * (dp - delta)", "p * dp"),
    (
        "drops the chain rule",
        "backward:softcap",
        "ds = tl.where(kept, dlogit",
        "ds = tl.where(kept, 1.01 * dlogit",
    ),
    (
        "skips a tile of queries",
        "backward:causal",
        "end = tl.where(seen, tile + 1, end)",
        "end = tl.where(seen, tile, end)",
    ),
    ("adds rows past the end", "backward:scale", "p = tl.where(rows_inside &", "p = tl.where(True |"),
    ("joins a split badly", "decode:scale", "l = l * decay + l_part * weight", "l = l * decay + l_part"),
    ("reads the page of another key", "paged decode:gqa", "slots + k // PAGE", "slots + (k + 1) // PAGE"),
    ("takes all lengths for one", "paged forward:causal", "b * key_lengths_stride0", "0 * key_lengths_stride0"),
    ("forgets that the maximum grew", "entropy", "(u + (m - shift) * l) * decay", "u * decay"),
    ("joins entropies badly", "decode:entropy", "(u_part + (m_part - shift) * l_part) * weight", "u_part * weight"),
    ("weighs from another row", "side:window", "row_max = tl.load(rows_ptr + row)", "row_max = tl.load(rows_ptr)"),
    (
        "leaves a tile of queries out",
        "side:causal",
        "end = tl.where(seen, tile + 1, end)",
        "end = tl.where(seen, tile, end)",
    ),
    ("stores too few rows", "scale", "[:, None] < n_q\n", "[:, None] < n_q - 1\n"),
)


def test_kernels_that_are_broken_on_purpose_are_caught() -> None:
    jobs = []
    for _, case, old, new in MUTATIONS:
        kind, _, name = case.rpartition(":")
        batch = 3 if kind.startswith("paged") else 1
        more = {"splits": 3, "page": 8, "name": "column_mass", "change": [old, new]}
        jobs.append(job(name, "float32", (batch, 19, 37), kind=kind or "forward", **more))
    caught = verdicts(jobs)
    assert len(caught) == len(MUTATIONS), caught
