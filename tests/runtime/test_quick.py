"""A call that is remembered gives what it gave before, and is forgotten where it must be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import dispatch
from attnopt.runtime.dispatch import AttnoptWarning, Dispatcher
from attnopt.runtime.native import Native
from attnopt.runtime.op import attention
from attnopt.runtime.quick import quick
from attnopt.runtime.reference import reference
from tests.runtime.cases import PLAIN, inputs

TEXT = PLAIN.text


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(Options.make())
    token = dispatch._active.set(dispatcher)
    yield dispatcher
    dispatch._active.reset(token)


def launches(monkeypatch: pytest.MonkeyPatch, site: dispatch._Site) -> list[Tensor]:
    """The queries of later calls that did not ask the dispatcher."""
    seen: list[Tensor] = []
    real = Native.launch

    def launch(self: Native, q: Tensor, *more: object) -> object:
        seen.append(q)
        return real(self, q, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Native, "launch", launch)
    monkeypatch.setattr(Dispatcher, "run", lambda *_: pytest.fail("the dispatcher was asked"))
    return seen


def test_the_second_call_goes_straight_to_the_kernel(active: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(PLAIN)
    first = quick(q, k, v, TEXT)
    seen = launches(monkeypatch, active.site(TEXT))
    second = quick(q * 1, k, v, TEXT)
    assert len(seen) == 1
    assert torch.equal(first[0], second[0])
    assert_close(second[0], reference(PLAIN, q, k, v)[0])
    assert second[1].shape == (0,)
    assert second[1].dtype == torch.float32


def test_other_strides_are_another_call(active: Dispatcher) -> None:
    q, k, v = inputs(PLAIN)
    quick(q, k, v, TEXT)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(quick(turned, k, v, TEXT)[0], reference(PLAIN, q, k, v)[0])
    assert_close(quick(turned, k, v, TEXT)[0], reference(PLAIN, q, k, v)[0])
    assert len(active.site(TEXT).calls) == 2


def test_lse_is_made_anew(active: Dispatcher) -> None:
    q, k, v = inputs(PLAIN)
    spec = replace(PLAIN, returns=("lse",))
    one, two = quick(q, k, v, spec.text)[1], quick(q, k, v, spec.text)[1]
    assert len(active.site(spec.text).calls) == 1
    assert one.data_ptr() != two.data_ptr()
    assert_close(two, reference(spec, q, k, v)[1])


def test_what_reads_more_or_runs_elsewhere_is_not_remembered(active: Dispatcher) -> None:
    q, k, v = inputs(PLAIN)
    listed = replace(PLAIN, keep=(ex.k <= ex.q) & (ex.b >= 0))
    attention(replace(PLAIN, score=ex.s * ex.scalar("x"), scalars=("x",)), q, k, v, scalars=[2])
    quick(q.double(), k.double(), v.double(), TEXT)
    assert not active.site(TEXT).calls
    quick(q, k, v, listed.text)
    assert len(active.site(listed.text).calls) == 1


def test_a_kernel_that_fails_later_is_no_error(active: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(PLAIN)
    quick(q, k, v, TEXT)

    def broken(*_: object) -> None:
        raise CompileError("the kernel ran out of memory")

    monkeypatch.setattr(Native, "launch", broken)
    with pytest.warns(AttnoptWarning, match="ran out of memory"):
        found = quick(q, k, v, TEXT)[0]
    assert_close(found, reference(PLAIN, q, k, v)[0])


def test_what_is_forgotten_is_asked_again(active: Dispatcher) -> None:
    q, k, v = inputs(PLAIN)
    quick(q, k, v, TEXT)
    site = active.site(TEXT)
    site.forget()
    assert not site.calls
    assert not site.shapes
    quick(q, k, v, TEXT)
    assert site.calls
    assert site.shapes


def test_an_import_within_a_mode_makes_no_special_tensor() -> None:
    code = """
import torch
with torch.inference_mode(), torch.device("meta"):
    from attnopt.runtime import quick
assert quick._NOTHING.device.type == "cpu" and not quick._NOTHING.is_inference()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
