"""The exporter reads its table of operators anew at every call, half a second each: here it is read once."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_registry() -> Iterator[None]:
    """Keep the registry of `torch.onnx.export` for the session."""
    if importlib.util.find_spec("onnxscript") is None:
        yield
        return
    from torch.onnx._internal.exporter import _registration

    held = _registration.ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "from_torchlib", staticmethod(functools.lru_cache(held.from_torchlib)))
        yield
