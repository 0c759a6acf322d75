"""Which elements meet in a contraction."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt.patterns.contraction import contract, extent, is_contraction, lengths
from tests.modules import captured

I, J, B, D = sp.symbols("i j b d", integer=True, nonnegative=True)
X, Y = torch.randn(2, 3, 4), torch.randn(1, 4, 5)


def _node(run, *inputs):  # type: ignore[no-untyped-def]
    return captured(run, *inputs).gm.graph.output_node().args[0][0]


def test_a_broadcast_batch_is_read_at_zero() -> None:
    node = _node(torch.matmul, X, Y)
    left, right = contract(node, (B, I, J), D)  # type: ignore[misc]
    assert (left[1], right[1]) == ((B, I, D), (0, D, J))
    assert extent(node) == 4


@pytest.mark.parametrize(
    ("equation", "right"),
    [
        ("bid,cdj->bij", None),
        ("bid,bdj->bij", (0, D, J)),
        ("bid,bjd->bij", (0, J, D)),
        ("...id,...dj->...ij", (0, D, J)),
    ],
)
def test_einsum(equation: str, right: object) -> None:
    y = Y.mT.contiguous() if "jd" in equation else Y
    found = contract(_node(lambda a, b: torch.einsum(equation, a, b), X, y), (B, I, J), D)
    assert (found and found[1][1]) == right


def test_other_operators_are_no_contraction() -> None:
    assert contract(_node(torch.add, X, X), (B, I, J), D) is None
    assert contract(_node(torch.addbmm, X[0, :, :1], X, Y.expand(2, 4, 5)[..., :3]), (I, J), D) is None


def test_a_vector_has_no_dimension_of_its_own() -> None:
    left, right = contract(_node(torch.matmul, X, torch.randn(4)), (B, I), D)  # type: ignore[misc]
    assert (left[1], right[1]) == ((B, I, D), (D,))
    left, right = contract(_node(torch.matmul, torch.randn(4), Y), (B, J), D)  # type: ignore[misc]
    assert (left[1], right[1]) == ((D,), (B, D, J))


def test_lengths_that_the_operator_holds_equal() -> None:
    def run(x: torch.Tensor, y: torch.Tensor, sizes: torch.Tensor, product: object) -> torch.Tensor:
        a, b = sizes.tolist()
        for n in (a, b):
            torch._check(n >= 2)
            torch._check(n <= 4)
        return product(x[..., :a], y[:, :b])  # type: ignore[operator]

    sizes = torch.tensor([3, 3])
    found = _node(lambda x, y, n: run(x, y, n, torch.matmul), X, Y, sizes)
    assert is_contraction(found)
    assert len(lengths(found)) == 2
