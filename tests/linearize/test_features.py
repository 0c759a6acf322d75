"""Feature maps: their formulas, and that they are nowhere negative."""

from __future__ import annotations

import pytest
import torch

from attnopt.linearize.features import LARGEST, MAPS, eager

X = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_formulas() -> None:
    torch.testing.assert_close(MAPS["elu"].make(eager, X, None), torch.nn.functional.elu(X) + 1)
    torch.testing.assert_close(MAPS["relu"].make(eager, X, None), X.clamp_min(0))
    u = torch.einsum("bhnd,hdf->bhnf", X, W).clamp(-10, 10)
    torch.testing.assert_close(MAPS["hedgehog"].make(eager, X, W), torch.cat([u.exp(), (-u).exp()], -1))


@pytest.mark.parametrize("name", MAPS)
def test_features_are_as_many_as_said_and_finite_in_half_precision(name: str) -> None:
    made = MAPS[name].make(eager, (1000 * X).half(), W.half())
    assert made.shape[-1] == MAPS[name].width(4, 5)
    assert bool((made >= 0).all())
    assert name != "hedgehog" or bool(made.isfinite().all())
    assert torch.tensor(LARGEST).exp().half().isfinite()


def test_rows_of_hedgehog_never_sum_to_zero() -> None:
    """Each pair of features adds `2 cosh(u + w)`."""
    q, k = (MAPS["hedgehog"].make(eager, x, W) for x in (9 * X, -9 * X))
    assert float((q @ k.mT).min()) >= 2 * W.shape[2]
