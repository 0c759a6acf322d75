from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")


def test_warming_up_works_and_takes_one_thread() -> None:
    threads = torch.get_num_threads()
    try:
        from attnopt.coverage.warm import warm

        torch.set_num_threads(2)
        warm()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
