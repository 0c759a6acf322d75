"""Row passes at the edges of vectors and tiles, for both kinds of normaliser."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.base import Plan
from tests.codegen.harness import agree
from tests.codegen.test_cpp_skeleton import tensors_of
from tests.specs import case


@pytest.mark.parametrize("n_k", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("name", ["causal_bottom_right", "linear_absolute", "signed"])
def test_every_length_around_a_vector(name: str, n_k: int) -> None:
    item = case(name)
    agree(item.spec, tensors_of(item, (1, 10, n_k)), item.scalars, plan=Plan(8, 16, 8, 4))


def test_an_infinite_logit_is_what_softmax_makes_of_it() -> None:
    item = case("bias")
    tensors = tensors_of(item, (1, 9, 40))
    tensors[3][0, 2, 33] = torch.inf
    agree(item.spec, tensors, plan=Plan(8, 16, 8, 4))


def test_the_running_maximum_falls_behind_and_catches_up() -> None:
    """Logits that rise over many tiles: every tile rescales what came before."""
    item = case("bias")
    tensors = tensors_of(item, (1, 9, 200))
    tensors[3] += torch.arange(200) * 3.0
    agree(item.spec, tensors, plan=Plan(8, 16, 8, 4))
