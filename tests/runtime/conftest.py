"""Specs, inputs and a compile cache that the runtime tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attnopt.options import Options
from attnopt.runtime.dispatch import Dispatcher, use


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels") / "cache"


@pytest.fixture(autouse=True)
def own_cache(kernel_cache: Path) -> Iterator[Dispatcher]:
    with use(Options(cache_dir=str(kernel_cache))) as dispatcher:
        yield dispatcher
