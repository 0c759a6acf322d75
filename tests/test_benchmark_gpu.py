"""The GPU script takes all its steps on fake tensors, writes what it found, and knows what has to be reached."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnopt.runtime.pages import entries
from attnopt.runtime.triton_binaries import Binary
from attnopt.runtime.triton_compile import Compiled
from tests.runtime.ahead_calls import Launch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("gpu")
    sys.path.remove(str(FOLDER))


def test_a_dry_run_takes_every_step(script: ModuleType, tmp_path: Path) -> None:
    some = (
        "dense D=128",
        "dense bias",
        "decode 32k",
        "causal D=64 backward",
        "linear 2k D=64",
        "blocks kept 10% D=256",
    )
    rows = tuple(r for r in script.ROWS if r.name in some)
    assert len(rows) == len(some)
    assert script.main(["--dry", "--out", str(tmp_path), "--only", "sink"], rows) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report["correctness"]) == 3 * 3 * 3 + 3 * 2
    kinds = {"forward", "decode", "backward", "paged", "paged prefill"}
    assert {c["kind"] for c in report["correctness"]} == kinds
    assert all(c["ok"] and "dry" in c["note"] for c in report["correctness"])
    assert all("decode" in c["note"] for c in report["correctness"] if c["kind"] == "decode")
    assert report["plans"] >= 8
    notes = {row["name"]: row["note"] for row in report["table"]}
    assert set(notes) == set(some)
    assert all(note.startswith("dry: ") for note in notes.values())
    assert "warps" in notes["linear 2k D=64"]
    assert "of a list" in notes["blocks kept 10% D=256"]
    assert set(report["expected"]) == set(script.BUDGET)
    page = (tmp_path / "gpu.md").read_text()
    assert "| attention |" in page
    assert "33 of 33 calls right" in page


def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--dry"):
        script.run(False)


def test_what_fails_does_not_end_the_run(script: ModuleType) -> None:
    def fails() -> dict[str, object]:
        raise ValueError("first line\nsecond line")

    assert script.attempt(fails) == {"ok": False, "note": "ValueError: first line"}


def test_every_row_is_proven_and_the_whole_run_is_expected_to_fit(script: ModuleType) -> None:
    chip, special, estimate = script.CHIPS["sm_90"], script.table.special, script.estimate
    with FakeTensorMode():
        for row in script.ROWS:
            if row.kind in script.table.SPECIAL:
                assert special.proven(row, chip, special.inputs(row, torch.bfloat16, "cuda"), "bfloat16")
    plans = {row.name: len(script.table.plans(row, chip)) for row in script.ROWS}
    expected = estimate.seconds(script.ROWS, len(script.check.checks()), plans)
    ends = estimate.ends(expected)
    assert list(ends.values()) == sorted(ends.values())
    assert ends["thorough"] < script.LAST < 9 * 60
    assert max(script.BUDGET.values()) < script.LAST
    assert "left out" not in estimate.text(expected)
    assert "correctness, compile" in estimate.text({**expected, "correctness": 900.0, "compile": 900.0})


def test_files_are_written_after_every_row(script: ModuleType, tmp_path: Path) -> None:
    rows, seen = script.ROWS[:2], []

    def save(found: dict[str, Any]) -> None:
        script.write(tmp_path, found)
        read = json.loads((tmp_path / "gpu.json").read_text())
        seen.append((len(read["correctness"]), len(read["table"])))
        assert (tmp_path / "gpu.md").read_text().startswith("# dry run")

    with FakeTensorMode():
        script.run(True, rows, ["dense"], lambda text: None, save)
    assert seen == [(27, 0), (27, 1), (27, 2), (27, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_a_checkout_need_not_be_installed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [x for x in sys.path if Path(x) not in (FOLDER, FOLDER.parent)])
    runpy.run_path(str(FOLDER / "gpu.py"), run_name="elsewhere")
    assert sys.path[:2] == [str(FOLDER), str(FOLDER.parent)]


def test_kernels_of_linear_attention_are_checked_forward_and_backward(script: ModuleType) -> None:
    found = [c for c in script.check.checks(["linear", "retention", "causal"]) if "linear" in c.kind]
    assert {(c.spec, c.kind) for c in found} == {
        (spec, kind) for spec in ("linear", "retention") for kind in ("linear", "linear backward")
    }
    with FakeTensorMode():
        for one in found:
            verdict = script.check.judged(one, script.CHIPS["sm_90"], False)
            assert verdict["ok"]
            assert verdict["note"].startswith("dry: ")


def test_kernels_of_pages_are_checked_by_both_templates(script: ModuleType) -> None:
    found = [c for c in script.check.checks(["window", "bias", "dense"]) if "paged" in c.kind]
    assert {(c.spec, c.kind, c.dtype) for c in found} == {
        (spec, kind, "bfloat16") for spec in ("window", "bias") for kind in ("paged", "paged prefill")
    }
    with FakeTensorMode():
        for one in found:
            verdict = script.check.judged(one, script.CHIPS["sm_90"], False)
            assert verdict["note"].startswith("dry: decode" if one.kind == "paged" else "dry: forward"), verdict


def test_the_ways_to_kernels_are_checked_too(script: ModuleType) -> None:
    paths, chip = script.check.PATHS, script.CHIPS["sm_90"]
    found = [c for c in script.check.checks() if c.kind in paths]
    assert [c.kind for c in found] == [c.kind for c in script.check.checks(["paths"])] == list(paths)
    assert all("dry" in script.check.judged(c, chip, False)["note"] for c in found)
    for name, used in (("select topk", "cpp: "), ("select padded", "cpp: "), ("decay by token", "cpp linear: ")):
        result = paths[name](chip, "cpu")
        assert result["ok"], result
        assert result["note"].startswith(used)


def test_what_was_compiled_ahead_is_launched_and_judged(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a driver that computes nothing: every kernel is taken from the folder, and what is not written is wrong."""
    launched: list[str] = []
    made = lambda kernel, entry, chip: Compiled(chip, entry.name, b"", {}, 1, 4, None, None, {})  # noqa: E731
    monkeypatch.setattr("attnopt.aot.build.compile_entry", made)
    monkeypatch.setattr(Binary, "restore", lambda self: Launch(launched, self.entry))
    result = script.check.PATHS["ahead of time"](script.CHIPS["sm_90"], "cpu")
    assert len(set(launched)) == len(launched) == 6
    assert result["note"].startswith("combine, delta, dkv, dq, forward, split; ")
    assert not result["ok"]


def test_a_way_that_warns_is_wrong(script: ModuleType) -> None:
    paths = importlib.import_module("gpu_parts.paths")

    def warns() -> dict[str, Any]:
        warnings.warn("no kernel", paths.dispatch.AttnoptWarning, stacklevel=1)
        return {"ok": True, "note": "done"}

    assert paths._told(warns) == {"ok": False, "note": "no kernel; done"}


def test_pages_of_the_check_hold_what_they_were_made_of(script: ModuleType) -> None:
    q, k, v = (torch.randn(3, 2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 37, 38))
    given = script.check.paged.in_pages((q, k, v[:, :, :37]), 16)
    assert given.key_lengths.tolist() == [37, 0, 12]
    for b, keys, values in entries(given):
        n = keys.shape[2]
        assert torch.equal(keys[0], k[b, :, :n])
        assert torch.equal(values[0], v[b, :, :n])


def test_new_keys_of_the_check_are_the_last_ones(script: ModuleType) -> None:
    q, k, v = (torch.randn(1, 2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 37, 38))
    given = script.check.paged.in_pages((q, k, v[:, :, :37]), 16, 5)
    assert given.lengths == [37]
    _, keys, values = next(entries(given))
    assert torch.equal(keys, k)
    assert torch.equal(values, v[:, :, :37])


def test_work_and_traffic(script: ModuleType) -> None:
    rows = {row.name: row for row in script.ROWS}
    row, back = rows["causal D=128"], rows["causal D=128 backward"]
    assert row.flops == 0.5 * 4 * 4 * 16 * 4096 * 4096 * 128
    assert back.flops == 2.5 * row.flops
    assert row.bytes == 2 * 4 * 4 * 4096 * 16 * 128
    assert back.bytes == 2 * row.bytes
    assert rows["dense bias"].bytes == rows["dense D=128"].bytes + 4 * 16 * 4096**2
    decode = rows["decode 128k"]
    assert decode.floor({"flops": 790e12, "bytes": 4.3e12}) == decode.bytes / 4.3e12
    assert len(rows) == len(script.ROWS)
    assert {r.n_q for r in script.ROWS if r.kind == "linear"} == {2048, 8192, 32768, 65536}
    assert {(r.heads.d_v, round(r.kept, 1)) for r in script.ROWS if r.kind == "sparse"} >= {(64, 0.1), (256, 0.5)}


def test_targets_are_judged_by_figures(script: ModuleType) -> None:
    rows = {row.name: row.targets for row in script.ROWS}
    found: list[dict[str, Any]] = [
        {"name": "dense D=128", "tflops": 480.0, "times_flex": 0.9},
        {"name": "dense bias", "tflops": 430.0},
        {"name": "decode 128k", "note": "left out"},
    ]
    script.judge(found, rows)
    verdicts = [[t["met"] for t in row["targets"]] for row in found]
    assert verdicts == [[True, False], [False, None], [None]]
    page = script.report._line({**found[1], "ms": 1.0})
    assert "0.9 of dense D=128" in page
    assert "no; ?" in page


def test_speeds_are_compared_with_the_best_of_each(script: ModuleType) -> None:
    found = script.table.speedups(1e-3, {"flash": 2.0, "cudnn": 1.5, "flex": 3.0, "flex tuned": 2.5, "efficient": "no"})
    assert found == {"times_sdpa": 1.5, "times_flex": 2.5}
    assert script.table.speedups(1e-3, {"flex": "cannot"}) == {}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_special_rows_and_their_rivals_compute_the_same(script: ModuleType) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    from attnopt.runtime.reference import reference
    from attnopt.spec import Heads

    rivals, special = importlib.import_module("gpu_parts.rivals"), script.table.special
    row = script.Row("", "blocks", Heads(2, 2, 2, 16, 16), 1, 512, 512, 0.5, "sparse")
    q, k, v, kept = special.inputs(row, torch.float32, "cpu")
    assert kept.sum(-1).unique().tolist() == [2]
    golden = reference(special.spec_of(row), q, k, v, [kept], ())[0]
    block = rivals.whole_blocks(kept, rivals.score_and_mask(row, [kept])[1], row)
    assert block.sparsity() == 50
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block), golden, atol=1e-5, rtol=1e-5)
    call, tensors = special.call(script.Row("", "linear", row.heads, 1, 300, 300, kind="linear"), torch.float32, "cpu",
                                 script.Options())  # fmt: skip
    spec = special.spec_of(script.Row("", "linear", row.heads, 1, 300, 300, kind="linear"))
    golden = reference(spec, *tensors, [], ())[0]
    torch.testing.assert_close(call(), golden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rivals.operators(spec, tensors)(), golden, atol=1e-4, rtol=1e-4)
    assert rivals.operators(special.spec_of(row), [q, k, v]) == "no such attention"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rivals_compute_the_same(script: ModuleType) -> None:
    """FlexAttention's functions and SDPA's arguments say what the specs say, here on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from attnopt.aot.inputs import usual_inputs
    from attnopt.aot.standard import standard
    from attnopt.runtime.reference import reference
    from attnopt.spec import Heads

    heads, said = Heads(4, 2, 2, 16, 16), 0
    for name, spec in standard(heads):
        row = script.Row(name, name, heads, 1, 24, 24)
        q, k, v, *captures = usual_inputs(spec, 1, 24, 24, torch.float32, "cpu")
        both = importlib.import_module("gpu_parts.rivals").score_and_mask(row, captures)
        if both is None:
            continue
        score, mask = both
        block = None if mask is None else create_block_mask(mask, 1, None, 24, 24, device="cpu")
        found = flex_attention(q, k, v, score_mod=score, block_mask=block, enable_gqa=True)
        torch.testing.assert_close(found, reference(spec, q, k, v, captures, ())[0], atol=1e-5, rtol=1e-5)
        said += 1
    assert said == 9


def test_the_picture_needs_figures_and_matplotlib(script: ModuleType, tmp_path: Path) -> None:
    roof = {"roof": {"flops": 790e12, "bytes": 4.3e12}, "device": "a card", "date": "today"}
    assert "nothing" in script.report.roofline({**roof, "roof": None}, [], tmp_path / "x.png")
    said = script.report.roofline(roof, [("dense", 500.0, 480.0)], tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file() if not said else "matplotlib" in said


def test_flex_tuned_is_one_more_rival(script: ModuleType) -> None:
    row = {"name": "dense D=128", "ms": 1.0, "rivals": {"flex": 2.0, "flash": 3.0}, "times_flex": 2.0}
    script.table.add_thorough(row, {"ok": True, "flex tuned": 1.5})
    assert (row["times_flex"], row["rivals"]["flex tuned"]) == (1.5, 1.5)  # type: ignore[index]
    script.table.add_thorough(row, {"ok": None, "note": "left out"})
    assert (row["times_flex"], row["rivals"]["flex tuned"]) == (2.0, "left out")  # type: ignore[index]
