"""The conformance list in ONNX Runtime: every operator that claims a spec computes it, empty rows included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.onnx import emit, probe
from attnopt.onnx.form import CAUSAL
from attnopt.onnx.operators import OPERATORS
from attnopt.onnx.sites import Attention
from attnopt.runtime.validate import Verdict
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads
from tests.onnx.sites import of_case, site
from tests.specs import CASES

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)


def _named(name: str):
    return next(case for case in CASES if case.name == name)


def _with_empty_rows(n_q: int, n_k: int, target: str) -> dict[str, Attention]:
    """Rows without a key: by padding, by padding and the causal mask, by a bias of -inf, of the lowest float, both."""
    padding = torch.ones(2, n_k, dtype=torch.bool)
    padding[0], padding[1, :3] = False, False
    bias = torch.zeros(2, 4, n_q, n_k)
    bias[0, 0, 1], bias[0, 1, 2], bias[1, :, 3, 4:] = -torch.inf, torch.finfo(torch.float32).min, -torch.inf
    bias[1, 2, 0, ::2], bias[1, 2, 0, 1::2] = -torch.inf, torch.finfo(torch.float32).min
    pad, loaded = Capture("pad", "bool", (None, None)), Capture("bias", "float", (None, 4, None, None))
    kept = sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0)
    score = ex.s / 4 + ex.load("bias", ex.b, ex.h, ex.q, ex.k)
    found = {}
    for policy in EmptyRow:
        base = AttentionSpec(Heads(4, 4, 4, 8, 8), ex.s / 4, empty_row=policy)
        rows = {
            "padding": (replace(base, keep=kept, captures=(pad,)), [padding]),
            "causal": (replace(base, keep=sp.And(kept, CAUSAL), captures=(pad,)), [padding]),
            "bias": (replace(base, score=score, captures=(loaded,)), [bias]),
            "causal bias": (replace(base, score=score, keep=CAUSAL, captures=(loaded,)), [bias]),
            "both": (replace(base, score=score, keep=kept, captures=(loaded, pad)), [bias, padding]),
        }
        for name, (spec, captures) in rows.items():
            found[f"{name} {policy.value}"] = site(spec, n_q, n_k, target, captures=captures)
    return found


@pytest.mark.parametrize(("target", "n_q", "n_k"), [("onnx", 5, 12), ("ort", 9, 9)])
def test_every_claim_holds(target: str, n_q: int, n_k: int) -> None:
    sites = {case.name: of_case(case, n_q, n_k, target) for case in CASES} | _with_empty_rows(n_q, n_k, target)
    claimed = {name: s for name, s in sites.items() if s.operator is not None}
    if target == "ort":  # the standard operator has its own run
        claimed = {n: s for n, s in claimed.items() if s.operator.version or " " in n}
    before = {name: s.kernel for name, s in claimed.items()}
    probe.choose(list(claimed.values()), 23)
    wrong = {name: s.reasons for name, s in claimed.items() if s.kernel != before[name]}
    assert not wrong
    assert all(s.verdict is not None and s.verdict.ok for s in claimed.values())
    assert {s.operator.name for s in claimed.values()} == {op.name for op in OPERATORS if target in op.targets}
    assert len(claimed) >= 30


def test_equal_sites_share_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, run = [], probe._probed
    monkeypatch.setattr(probe, "_probed", lambda sites, opset: (counts.append(len(sites)), run(sites, opset))[1])
    sites = [of_case(_named("gqa"), 9, 9, "onnx") for _ in range(3)] + [of_case(_named("scale"), 9, 9, "onnx")]
    probe.choose(sites, 23)
    assert counts == [2]
    assert all(s.verdict.ok for s in sites)


def test_an_operator_that_is_wrong_or_cannot_run_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three sites one operator is refused by ONNX Runtime and one computes something else."""

    def refused(call, version):
        return torch.onnx.ops.symbolic("com.microsoft::NoSuch", (call.q,), dtype=call.q.dtype, shape=call.q.shape)

    def wrong(call, version):
        return emit.standard(call, 23) * 1.001

    sites = [of_case(_named(name), 9, 9, "ort") for name in ("gqa", "scale", "causal")]
    first = [s.operator.name for s in sites]
    sites[0].operator = replace(sites[0].operator, emit=refused)
    sites[1].operator = replace(sites[1].operator, emit=wrong)
    probe.choose(sites, 23)
    assert all(s.verdict.ok for s in sites)
    assert sites[0].kernel == "ai.onnx.Attention-23"
    assert sites[0].reasons[-1].startswith(f"{first[0]}: ONNX Runtime:")
    assert f"{first[1]}: rms error above" in sites[1].reasons[-1]
    assert sites[2].operator.name == first[2]


def test_long_sites_are_judged_on_sampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_MOST_SCORES", 10)
    long = of_case(_named("scale"), 64, 64, "onnx")
    probe.choose([long], 23)
    assert long.verdict.ok
    kept = torch.linspace(0, 63, 32, dtype=torch.int64).unique()
    out = torch.zeros(2, long.spec.heads.q, 64, long.spec.heads.d_v)
    assert not probe._judged(long, long.seen, out).ok
    assert kept.numel() < 64
    assert isinstance(long.verdict, Verdict)


def test_a_site_that_saw_nothing_keeps_its_first_operator() -> None:
    unseen = site(_named("scale").spec)
    unseen.seen = None
    probe.choose([unseen], 23)
    assert unseen.operator is not None
    assert unseen.verdict is None
