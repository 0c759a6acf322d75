"""Learned maps come closer to the softmax than where they start, and the same data give the same maps."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.linearize.features import MAPS
from attnopt.linearize.fit import Example, Recipe, cross_entropy, fit, fit_all, near_keys, start
from attnopt.passes.stage import Seen
from attnopt.runtime.reference import Sample
from attnopt.runtime.weights import weights
from attnopt.spec import AttentionSpec, Capture, Heads

PAD = (Capture("pad", "bool", (None, None)),)
KEEP = sp.And(ex.q >= ex.k, sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0))
SPEC = AttentionSpec(Heads(4, 2, 2, 6, 6), ex.s / 2, KEEP, captures=PAD).canonical()
MAP = MAPS["hedgehog"]
ROWS, ZERO = torch.arange(20), torch.zeros(4, 1, 1)


def _example(seed: int = 0) -> Example:
    """The second of two entries, three of whose keys are padding."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(2, heads, 20, 6, generator=draw) for heads in (4, 2))
    pad = torch.ones(2, 20, dtype=torch.bool)
    pad[1, 10:13] = False
    return Example(Seen(SPEC, q, k, k, [pad], []), q[1:], k[1:], 1)


def _recipe(steps: int) -> Recipe:
    return Recipe(MAP, None, steps, 0, progress=False)


def test_the_cross_entropy_is_that_of_the_formulas() -> None:
    one = _example()
    query, key = start(SPEC)
    keep = torch.ones(20, 20).tril().bool() & one.seen.captures[0][1]
    k = one.k[:, [0, 0, 1, 1]]
    true = (one.q @ k.mT / 2).masked_fill(~keep, -torch.inf).softmax(-1)
    torch.testing.assert_close(
        weights(SPEC, one.q, one.k, one.seen.captures, (), None)[0][0, 0, 0, 0], true[0, 0, 0, 0]
    )
    u, w = one.q * 2**-0.5, k * 2**-0.5
    linear = (2 * torch.cosh(u[:, :, :, None] + w[:, :, None])).sum(-1) * keep
    wanted = -(true * (linear / linear.sum(-1, keepdim=True)).clamp_min(1e-30).log()).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(one, MAP, (query, key, ZERO), ROWS), wanted)


def test_a_fit_is_closer_than_its_start_and_repeatable() -> None:
    one = _example()
    found, again = fit([one], _recipe(30)), fit([one], _recipe(30))
    assert torch.equal(found.query, again.query)
    assert torch.equal(found.key, again.key)
    before = cross_entropy(one, MAP, (*start(SPEC), ZERO), ROWS)
    after = cross_entropy(one, MAP, (found.query, found.key, found.balance), ROWS)
    assert len(found.losses) == 30
    assert after < before - 0.1


def test_every_site_has_its_own_fit() -> None:
    found = fit_all({"a": [_example()], "b": [_example(3)]}, _recipe(2))
    assert list(found) == ["a", "b"]
    assert not torch.equal(found["a"].query, found["b"].query)
    assert found["a"].query.shape == (4, 6, 6)
    assert found["a"].key.shape == (2, 6, 6)


def test_fewer_features_than_the_width_of_a_head() -> None:
    query, key = start(SPEC, 3)
    assert query.shape == (4, 6, 3)
    assert key.shape == (2, 6, 3)


def test_beside_a_window_the_near_weights_are_the_softmax() -> None:
    one = _example()
    learned = (*start(SPEC), ZERO)
    assert near_keys(SPEC.keep, 4) == ex.canon(ex.q - ex.k < 4)
    assert near_keys(sp.true, 4) is None
    entropy = cross_entropy(one, MAP, learned, ROWS, near_keys(SPEC.keep, 100))
    true = weights(SPEC, one.q, one.k, one.seen.captures, (), Sample(torch.tensor([1]), whole_batch=2))[0]
    torch.testing.assert_close(entropy, torch.special.entr(true).sum(-1).mean())
    alone, beside = (cross_entropy(one, MAP, learned, ROWS, near_keys(SPEC.keep, n)) for n in (1, 10))
    assert entropy < beside < alone
    found = fit([one], replace(_recipe(10), window=4))
    assert bool((found.balance != 0).all())
