"""While a CUDA graph is recorded the host reads nothing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnopt.codegen.base import Layout
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import capturing as module
from attnopt.runtime import dispatch, op
from attnopt.runtime.capturing import capturing, recorded, refuse
from attnopt.runtime.dispatch import Dispatcher
from tests.specs import case


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capturing", lambda: True)


def cuda(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16)


def test_nothing_is_recorded_without_a_driver() -> None:
    assert not capturing()
    assert not recorded(torch.empty(1))
    refuse(torch.empty(1), False, True, [torch.empty(1)])


def test_the_stream_is_asked_once_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not capturing()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert capturing()


def test_calls_that_the_host_has_to_check_are_refused(record: None) -> None:
    with FakeTensorMode():
        x = cuda(1)
        assert recorded(x)
        refuse(x, True, False, [x])
        refuse(x, False, False, [])
        with pytest.raises(CompileError, match="indexed by data"):
            refuse(x, True, True, [x])
        with pytest.raises(CompileError, match="before the capture"):
            refuse(x, False, False, [x])


class Backend:
    """A backend that says how often it ran."""

    name, by_data, calls = "triton", False, 0

    def leaves(self, *given: object) -> None:
        return None

    def __call__(self, q: torch.Tensor, *given: object) -> tuple[torch.Tensor, None]:
        self.calls += 1
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2), None


def test_what_was_recorded_at_first_is_compared_later(record: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def check_rows(*given: object) -> object:
        checked.append(1)
        return type("Verdict", (), {"ok": True})()

    backend, spec = Backend(), case("scale").spec
    monkeypatch.setattr(dispatch, "check_rows", check_rows)
    monkeypatch.setattr(dispatch, "layout_of", lambda *given: Layout("bfloat16"))
    monkeypatch.setattr(Dispatcher, "_backend", lambda *given: backend)
    dispatcher = Dispatcher(Options())
    with FakeTensorMode():
        heads = spec.heads
        q, k = cuda(1, heads.q, 8, heads.d_qk), cuda(1, heads.k, 8, heads.d_qk)
        for _ in range(2):
            dispatcher.run(q, k, k, (), (), spec.text)
        assert not checked
        monkeypatch.setattr(module, "capturing", lambda: False)
        for _ in range(2):
            dispatcher.run(q, k, k, (), (), spec.text)
    assert (backend.calls, len(checked)) == (4, 1)


def test_the_operator_is_open_to_cuda_graphs() -> None:
    for name in ("attention", "attention_backward"):
        tags = {"attention": op._FORWARD, "attention_backward": op._BACKWARD}[name].tags
        assert torch.Tag.pt2_compliant_tag in tags
        assert torch.Tag.cudagraph_unsafe not in tags
        assert torch.Tag.data_dependent_output not in tags
