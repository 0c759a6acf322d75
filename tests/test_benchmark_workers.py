"""The processes of the GPU script: what crashes, hangs or breaks its driver costs its own result alone."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def workers() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("gpu_parts.workers")
    sys.path.remove(str(FOLDER))


def test_work_is_shared_and_what_breaks_costs_nothing_else(workers: ModuleType) -> None:
    done, late = {"ok": True, "note": "done"}, {"ok": None, "note": workers.LATE}
    now = time.monotonic()
    with workers.Workers(2) as pool:
        found = dict(pool.run(dict, [(done,), (3,), (done,)], now + 60, now + 60, 60.0))
        assert found[0] == found[2] == done
        assert found[1]["ok"] is False
        assert "TypeError" in found[1]["note"]
        found = dict(pool.run(os._exit, [(7,), (8,)], now + 60, now + 60, 60.0))
        assert sorted(r["note"] for r in found.values()) == [f"its process ended with status {x}" for x in (7, 8)]
        assert not pool.all
        assert list(pool.run(dict, [(done,)], now - 1, now + 60, 60.0)) == [(0, late)]
        found = dict(pool.run(time.sleep, [(600.0,)], now + 60, now + 60, 0.2))
        assert found == {0: {"ok": False, "note": "still ran after 0 s"}}
        assert list(pool.run(time.sleep, [(600.0,)], now + 60, time.monotonic() + 0.2, 60.0)) == [(0, late)]
        assert list(pool.run(dict, [(done,)], now + 60, now + 60, 60.0)) == [(0, done)]
        left = pool.all[0].process
    assert not left.is_alive()
    assert left.exitcode == 0  # it ended by itself, when nobody needed it any longer


def test_a_process_whose_driver_is_broken_is_not_used_again(
    workers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    assert workers._sound()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not workers._sound()
    sent: list[Any] = []

    class Pipe:
        def recv(self) -> Any:
            assert not sent
            return dict, ({"ok": True, "note": "done"},)

        def send(self, given: Any) -> None:
            sent.append(given)

    class Ended(BaseException):
        pass

    def ends(status: int) -> None:
        raise Ended

    monkeypatch.setattr(workers.os, "_exit", ends)
    with pytest.raises(Ended):
        workers._serve(Pipe())
    assert sent == [({"ok": False, "note": "the driver failed afterwards"}, False)]
