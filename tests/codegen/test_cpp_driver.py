"""Both ways to share out the work give the same bits, whatever the sizes."""

from __future__ import annotations

import pytest
import torch

from tests.codegen.harness import run
from tests.specs import case


@pytest.mark.parametrize("sizes", [(1, 5, 9), (2, 55, 64), (1, 109, 200)])
def test_one_thread_by_heads_equals_many_by_tiles(sizes: tuple[int, int, int]) -> None:
    batch, n_q, n_k = sizes
    spec = case("gqa").spec
    q, k, v = torch.randn(batch, 8, n_q, 32), torch.randn(batch, 2, n_k, 32), torch.randn(batch, 2, n_k, 32)
    alone, _ = run(spec, [q, k, v], threads=1)
    shared, _ = run(spec, [q, k, v], threads=4)
    assert torch.equal(alone, shared)
