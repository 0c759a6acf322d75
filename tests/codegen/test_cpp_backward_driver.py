"""The driver of the backward: parts of the keys for several threads, and arguments that cannot be."""

from __future__ import annotations

import torch

from tests.codegen.test_cpp_backward_skeleton import gradients


def test_parts_of_the_keys_give_what_one_thread_gives() -> None:
    (_, alone, _), (_, shared, _) = (gradients("gqa", 101, 130, threads) for threads in (1, 6))
    for mine, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_arguments_that_cannot_be_are_refused() -> None:
    assert gradients("gqa", 1, 1, 0)[0] == 2
