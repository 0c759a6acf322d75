"""`optimize` and `explain`: what they give back, what they never change, what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt.errors import AttnoptError, CaptureError, OptionError, ShapeError, UnfusedError
from attnopt.runtime.dispatch import AttnoptWarning
from tests.modules import Function, SelfAttention


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@dataclass
class Result:
    out: torch.Tensor
    none: None = None
    count: int = 3


torch.export.register_dataclass(Result, serialized_type_name="attnopt.tests.Result")


def _attend(x: torch.Tensor) -> torch.Tensor:
    return (x @ x.mT).softmax(-1) @ x


def _equal(a: object, b: object) -> None:
    assert a == b
    assert type(a) is type(b)


OUTPUTS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("tensor", _attend),
    ("dataclass", lambda x: Result(_attend(x))),
    ("dictionary", lambda x: {"b": _attend(x), "a": [x + 1, None, 7]}),
    ("tuple", lambda x: (_attend(x), None, (x * 2,), "text", 1.5)),
)


@pytest.mark.parametrize(("name", "run"), OUTPUTS, ids=[n for n, _ in OUTPUTS])
def test_outputs_keep_their_type(name: str, run: Callable[..., Any], x: torch.Tensor) -> None:
    model = Function(run)
    fast = attnopt.optimize(model, (x,), strict=True)
    want, got = model(x), fast(x)
    assert type(got) is type(want)
    flat, spec = torch.utils._pytree.tree_flatten(want)
    found, same = torch.utils._pytree.tree_flatten(got)
    assert same == spec
    for a, b in zip(flat, found, strict=True):
        torch.testing.assert_close(b, a) if isinstance(a, torch.Tensor) else _equal(a, b)


def test_the_model_is_never_changed(x: torch.Tensor) -> None:
    model = SelfAttention(0.5)
    before = {n: (p, p.clone(), p._version) for n, p in model.named_parameters()}
    keys, forward = set(vars(model)), model.forward.__func__
    fast = attnopt.optimize(model, (x,))
    fast.eval()
    fast(x)
    assert model.training
    assert set(vars(model)) == keys
    assert model.forward.__func__ is forward
    for name, parameter in model.named_parameters():
        same, value, version = before[name]
        assert parameter is same
        assert parameter._version == version
        assert torch.equal(parameter, value)


def test_keyword_inputs_in_any_order(x: torch.Tensor) -> None:
    model = SelfAttention().eval()
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    fast = attnopt.optimize(model, (), {"x": x, "keep": keep}, strict=True)
    torch.testing.assert_close(fast(keep=keep, x=x), model(x, keep))
    assert str(fast.report.sites[0].spec) == "4 heads, d=4; score s/2; keep k <= q and mask[b, k] (empty row: uniform)"


def test_a_submodule_called_twice_and_a_shared_mask(x: torch.Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SelfAttention()
            self.tied = self.attention.out

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return self.tied(self.attention(self.attention(x, keep), keep))

    model, keep = Twice().eval(), torch.tensor([[True] * 5, [True] + [False] * 4])
    fast = attnopt.optimize(model, (x, keep), strict=True)
    assert fast.report.fused == 2
    assert {s.module_path for s in fast.report.sites} == {"attention"} or len(fast.report.sites) == 2
    torch.testing.assert_close(fast(x, keep), model(x, keep))
    assert list(fast.state_dict()) == list(model.state_dict())


def test_without_inputs_the_first_call_captures(x: torch.Tensor) -> None:
    model = SelfAttention().eval()
    fast = attnopt.optimize(model)
    assert not fast.report.sites
    assert "not captured yet" in fast.report.notes[0]
    torch.testing.assert_close(fast(x), model(x))
    assert fast.report.fused == 1


def test_strict_raises_and_otherwise_a_miss_is_reported(x: torch.Tensor) -> None:
    run = Function(lambda x: (x @ x.mT).softmax(-2) @ x)
    assert attnopt.optimize(run, (x,)).report.declined == 1
    with pytest.raises(UnfusedError, match="declined"):
        attnopt.optimize(run, (x,), strict=True)


def test_explain_changes_nothing(x: torch.Tensor) -> None:
    model = SelfAttention().eval()
    report = attnopt.explain(model, (x,))
    assert [s.status for s in report.sites] == ["fused"]
    with pytest.raises(OptionError, match="unknown arguments"):
        attnopt.explain(model, (x,), rewrite=())


MISUSE: tuple[tuple[str, Callable[[torch.Tensor], Any], type[AttnoptError], str], ...] = (
    ("no_module", lambda x: attnopt.optimize(len, (x,)), OptionError, "torch.nn.Module"),  # type: ignore[arg-type]
    ("no_tuple", lambda x: attnopt.optimize(SelfAttention(), x), OptionError, "write \\(x,\\)"),  # type: ignore[arg-type]
    ("no_mapping", lambda x: attnopt.optimize(SelfAttention(), (), [x]), OptionError, "mapping"),  # type: ignore[arg-type]
    ("rest", lambda x: attnopt.optimize(SelfAttention(), (x,), rest="jit"), OptionError, "eager, inductor"),
    ("option", lambda x: attnopt.optimize(SelfAttention(), (x,), options={"kernl": "cpp"}), OptionError, "kernel"),
    ("rewrite", lambda x: attnopt.optimize(SelfAttention(), (x,), rewrites=["x"]), OptionError, "attnopt.rewrites"),
    ("meta", lambda x: attnopt.optimize(SelfAttention(), (x.to("meta"),)), ShapeError, "Move one"),
    ("broken", lambda x: attnopt.optimize(Function(lambda x: x @ x), (x,)), CaptureError, "capture"),
)


@pytest.mark.parametrize(("name", "call", "kind", "message"), MISUSE, ids=[m[0] for m in MISUSE])
def test_misuse(
    name: str, call: Callable[[torch.Tensor], Any], kind: type[AttnoptError], message: str, x: torch.Tensor
) -> None:
    with pytest.raises(kind, match=message):
        call(x)


def test_disabled_leaves_the_model_as_it_is(x: torch.Tensor) -> None:
    model = SelfAttention().eval()
    fast = attnopt.optimize(model, (x,), options={"disable": True})
    assert not fast.report.sites
    assert torch.equal(fast(x), model(x))


def test_fuel_limits_the_sites(x: torch.Tensor) -> None:
    run = Function(lambda x: _attend(_attend(x)))
    report = attnopt.optimize(run, (x,), options={"fuel": 1}).report
    assert [s.status for s in report.sites] == ["fused", "declined"]


def test_a_wrong_kernel_is_never_used(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.runtime import dispatch

    right = dispatch.forward

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args)
        return out * 1.01, lse

    monkeypatch.setattr(dispatch, "forward", broken)
    model = SelfAttention().eval()
    fast = attnopt.optimize(model, (x,))
    (site,) = fast.report.sites
    assert site.status == "declined"
    assert "validation failed" in site.reason
    assert torch.equal(fast(x), model(x))


def test_buffers_and_counters_change_as_in_the_original(x: torch.Tensor) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return _attend(self.norm(x)) + self.calls

    model = Counting().train()
    twin = copy.deepcopy(model)
    fast = attnopt.optimize(model, (x,))
    assert model.calls == 0
    assert model.norm.num_batches_tracked == 0
    for _ in range(2):
        torch.testing.assert_close(fast(x), twin(x))
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value)


def test_gradients_are_those_of_the_original(x: torch.Tensor) -> None:
    model = SelfAttention()
    fast = attnopt.optimize(model, (x,), strict=True)
    fast(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


def test_an_empty_batch(x: torch.Tensor) -> None:
    model = SelfAttention().eval()
    fast = attnopt.optimize(model, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=0, max=9)},))
    assert fast(x[:0]).shape == (0, 5, 16)


def test_the_report_says_why_no_kernel_was_compiled(tmp_path: Path) -> None:
    model, options = SelfAttention(), attnopt.Options(cxx="/no/such/cxx", cache_dir=str(tmp_path / "cache"))
    with pytest.warns(AttnoptWarning, match="no compiled kernel"):
        fast = attnopt.optimize(model, (torch.randn(2, 300, 16),), options=options)
    (site,) = fast.report.sites
    assert any(note.startswith(f"{site.name}: ") and "/no/such/cxx" in note for note in fast.report.notes)
