"""One compile cache for all conformance tests of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attnopt.options import Options
from attnopt.runtime.dispatch import Dispatcher, use


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    # The judge here is the test itself, so the check at first use stands back.
    return Options(cache_dir=str(tmp_path_factory.mktemp("kernels") / "cache"), first_use_check=False)


@pytest.fixture(autouse=True)
def own_cache(options: Options) -> Iterator[Dispatcher]:
    with use(options) as dispatcher:
        yield dispatcher


@pytest.fixture
def cache_path(options: Options) -> Path:
    return options.cache_path
