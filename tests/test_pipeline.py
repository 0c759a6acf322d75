"""Found, lowered, dumped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import attnopt
from attnopt import pipeline
from attnopt.errors import Decline
from attnopt.options import Options
from attnopt.region import Region
from tests.modules import Function, captured, replay

ROOT = Path(__file__).resolve().parent.parent
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def _run(x: torch.Tensor) -> torch.Tensor:
    return (x @ x.mT).softmax(-1) @ x


def test_finding_changes_nothing_and_lowering_replaces_the_site() -> None:
    graph = captured(_run, X)
    before = str(graph.gm.graph)
    (found,) = pipeline.find(graph.gm.graph, graph.scalars, Options())
    assert str(graph.gm.graph) == before
    assert isinstance(found.result, Region)
    (site,) = [f.site() for f in pipeline.lower(graph.gm, [found])]
    assert site.status == "fused"
    targets = [n.target for n in graph.gm.graph.nodes]
    assert torch.ops.attnopt.attention.default in targets
    assert torch.ops.aten.softmax.int not in targets
    torch.testing.assert_close(replay(graph, X)[0], _run(X))


def test_past_the_dispatcher_the_graph_computes_the_same() -> None:
    graph = captured(_run, X)
    pipeline.lower(graph.gm, pipeline.find(graph.gm.graph, graph.scalars, Options()))
    pipeline.past_dispatcher(graph.gm)
    operator = torch.ops.attnopt.attention.default
    assert operator not in [n.target for n in graph.gm.graph.nodes]
    torch.testing.assert_close(replay(graph, X)[0], _run(X))
    x = X.clone().requires_grad_()
    (got,), (want,) = (torch.autograd.grad(y.square().sum(), x) for y in (replay(graph, x)[0], _run(x)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert operator in [n.target for n in make_fx(lambda x: replay(graph, x)[0])(X).graph.nodes]


SHORT = Function(lambda q, k: torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True).mT.sin())
Q = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(1))


def test_a_short_call_stays_and_the_report_says_why() -> None:
    fast = attnopt.optimize(SHORT, (Q, Q), strict=True)
    (site,) = fast.report.sites
    assert (site.status, site.kernel) == ("fused", "sdpa")
    assert "scaled_dot_product_attention, because the call is short" in "".join(fast.report.notes)
    assert torch.equal(fast(Q, Q), SHORT(Q, Q))
    q = Q.clone().requires_grad_()
    got, want = (torch.autograd.grad(run(q, Q).square().sum(), q)[0] for run in (fast, SHORT))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kernel", ["cpp", "reference"])
def test_who_asks_for_a_kernel_gets_it(kernel: str) -> None:
    fast = attnopt.optimize(SHORT, (Q, Q), options={"kernel": kernel})
    assert fast.report.sites[0].kernel == kernel
    assert not fast.report.notes


@pytest.mark.parametrize(
    "run",
    [
        lambda q, k: torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=k[..., :5].sigmoid()),
        lambda q, k: torch.nn.functional.scaled_dot_product_attention(q[0], k[0], k[0]),
        lambda q, k: torch.nn.functional.scaled_dot_product_attention(q, k, k, dropout_p=0.5),
        lambda q, k: (q @ k.mT).softmax(-1) @ k,
    ],
    ids=["masked", "three dimensions", "dropout", "by hand"],
)
def test_what_is_not_left(run: Callable[..., torch.Tensor]) -> None:
    graph = captured(run, Q, Q)
    (found,) = pipeline.leave(pipeline.find(graph.gm.graph, graph.scalars, Options()), Options())
    assert not found.left


def test_sizes_that_are_not_known_are_not_short() -> None:
    fast = attnopt.optimize(
        SHORT, (Q, Q), dynamic_shapes={"args": ({2: torch.export.Dim("n")}, {2: torch.export.Dim("m")})}
    )
    assert fast.report.sites[0].kernel != "sdpa"
    assert not fast.report.notes


def test_disabled_finds_nothing() -> None:
    graph = captured(_run, X)
    assert pipeline.find(graph.gm.graph, {}, Options(disable=True)) == []


def _twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x @ x.mT).softmax(-1) @ x, (x @ x.mT / 2).softmax(-1) @ x


@pytest.mark.parametrize(("fuel", "fused"), [(0, []), (1, [0]), (2, [0, 1]), (-1, [0, 1])])
def test_fuel_fuses_the_first_sites_and_declines_the_rest(fuel: int, fused: list[int]) -> None:
    fast = attnopt.optimize(Function(_twice), (X,), options={"fuel": fuel, "kernel": "reference"})
    assert [i for i, site in enumerate(fast.report.sites) if site.status == "fused"] == fused
    for site in fast.report.sites:
        if site.status == "declined":
            assert site.reason.startswith(f"the limit of {fuel} rewritten sites is used up")
            assert "ATTNOPT_FUEL" in site.hint
    torch.testing.assert_close(fast(X), _twice(X))


def test_a_decline_shows_node_and_hint() -> None:
    (site,) = attnopt.explain(Function(lambda x: (x @ x.mT).sort(-1).values.softmax(-1) @ x), (X,)).sites
    assert site.status == "declined"
    assert site.node.startswith("%sort = aten::sort [2, 5, 5] float32, [2, 5, 5] int64 (")
    # The line is that of the module's forward, as torch.export records it.
    assert site.node.split("(")[1].startswith(Function.forward.__code__.co_filename)
    assert site.hint


def test_explain_declines_what_lowering_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.Lowering, "lower", lambda self, region: Decline("no room", region.anchor, "make room"))
    (site,) = attnopt.explain(Function(_run), (X,)).sites
    assert (site.status, site.hint) == ("declined", "make room")
    assert site.reason.startswith("no room")
    assert site.node.startswith("%softmax = aten::softmax [2, 5, 5] float32 (")


def test_softmaxes_outside_of_attention_are_counted() -> None:
    report = attnopt.explain(Function(lambda x: (_run(x), x.softmax(-1).topk(2).values, x.log_softmax(-1))), (X,))
    assert [(o.name, o.reason.split(": ")[1]) for o in report.others] == [
        ("softmax_1", "its result goes to topk"),
        ("log_softmax", "its result goes to output"),
    ]
    assert "2 softmaxes are no attention (attnopt explain --all lists them)" in str(report)
    assert "its result goes to topk" in report.to_text(every=True)


def test_the_note_says_who_uses_the_weights() -> None:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights

    for report in (attnopt.explain(Function(run), (X,)), attnopt.optimize(Function(run), (X,)).report):
        (note,) = report.notes
        assert "%softmax is also used by the model's output, so it is still computed" in note


PROGRAM = """
import torch, attnopt
class M(torch.nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x
attnopt.optimize(M(), (torch.randn(2, 5, 8),), options={"kernel": "reference"})
"""


def _logged(tmp_path: Path, **environment: str) -> str:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    env = {name: text for name, text in os.environ.items() if not name.startswith(("TORCH_", "ATTNOPT_"))}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torch_logs_show_every_step_and_site(tmp_path: Path) -> None:
    lines = [line.split("] ", 1)[-1] for line in _logged(tmp_path, TORCH_LOGS="+attnopt").splitlines()]
    site = f"%softmax in {tmp_path / 'program.py'}:5 [softmax] 1 heads, d=8; score s"
    for step in ("found", "lowered"):
        assert f"{step}: 1 of 1 sites are fused" in lines
        assert f"{step}: {site}" in lines
    assert lines[-1] == "M: 1 site: 1 fused, 0 rewritten, 0 declined"


def test_without_torch_logs_nothing_is_said_and_at_info_only_the_summary(tmp_path: Path) -> None:
    assert "fused" not in _logged(tmp_path)
    shown = _logged(tmp_path, TORCH_LOGS="attnopt")
    assert "M: 1 site: 1 fused" in shown
    assert "found:" not in shown


def test_torch_trace_holds_the_report(tmp_path: Path) -> None:
    _logged(tmp_path, TORCH_TRACE=str(tmp_path / "trace"))
    (trace,) = (tmp_path / "trace").iterdir()
    assert "attnopt report for M" in trace.read_text()
    assert '"name": "attnopt_report"' in trace.read_text()
