"""The validator: what passes, what does not, and the measures of approximation."""

from __future__ import annotations

import pytest
import torch

from attnopt.runtime.validate import compare, cosine, relative_l1

G = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
E = G.float() * (1 + 3e-7 * torch.randn(1000, generator=torch.Generator().manual_seed(1)))


def test_rounding_passes_and_a_bias_does_not() -> None:
    assert compare(G, E, G.float()).ok
    verdict = compare(G, E, G.float() * 1.00001)
    assert not verdict.ok
    assert "rms error above 1.2" in str(verdict)


def test_one_bad_element_fails() -> None:
    kernel = G.float()
    kernel[17] += 1e-5
    verdict = compare(G, E, kernel)
    assert not verdict.ok
    assert verdict.max > verdict.max_eager


def test_gradients_have_wider_factors() -> None:
    kernel = (G + 2.5 * (E - G)).float()
    wider = (G + 1.4 * (E - G)).float()
    assert not compare(G, E, kernel, gradients=True).ok
    assert not compare(G, E, wider + 5e-7 * wider.sign()).ok
    assert compare(G, E, wider, gradients=True).ok


def test_elementary_operators_of_another_engine_have_the_widest() -> None:
    most = G + 2.0 * (E.double() - G)
    assert not compare(G, E, most + 1e-6 * most.sign(), gradients=True).ok
    assert compare(G, E, most, elementary=True).ok
    assert not compare(G, E, most + 1e-6 * most.sign(), elementary=True).ok


def test_nan_and_infinity_have_to_match() -> None:
    golden, eager = G.clone(), E.clone()
    golden[3], eager[3] = torch.nan, torch.nan
    golden[4], eager[4] = -torch.inf, -torch.inf
    same = golden.float()
    assert compare(golden, eager, same).ok
    assert "NaN is missing" in compare(golden, eager, torch.nan_to_num(same, nan=0.0)).reason
    assert "NaN where golden has none" in compare(G, E, same).reason
    assert "infinities differ" in compare(golden, eager, torch.where(same.isinf(), torch.tensor(0.0), same)).reason


def test_shapes_have_to_match_and_empty_results_agree() -> None:
    assert "shapes differ" in compare(G, E, E[:5]).reason
    assert compare(G[:0], E[:0], E[:0]).ok


def test_measures_of_approximation() -> None:
    assert relative_l1(G, G) == 0
    assert relative_l1(G, 1.1 * G) == pytest.approx(0.1)
    assert relative_l1(0 * G, G) == torch.inf
    assert cosine(G, 3 * G) == pytest.approx(1)
    assert cosine(G, -G) == pytest.approx(-1)
    assert cosine(0 * G, 0 * G) == 1
