"""Index arithmetic against numpy's ravel and unravel."""

from __future__ import annotations

import itertools
import math

import numpy as np
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.patterns.index import Sizes, nonnegative, same

PLACES = sp.symbols("i0 i1 i2 i3", integer=True, nonnegative=True)
n = sp.Symbol("n", integer=True, positive=True)


def _factors(count: int, choose: st.DataObject) -> list[int]:
    shape = []
    while count > 1:
        part = choose.draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        shape.append(part)
        count //= part
        if len(shape) == 3:
            break
    return [*shape, count] if count > 1 or not shape else shape


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_reshape_is_unravel_of_ravel(old: list[int], data: st.DataObject) -> None:
    new = _factors(math.prod(old), data)
    index = PLACES[: len(old)]
    sizes = Sizes(dict(zip(index, map(sp.Integer, old), strict=True)))
    found = sizes.reshape(index, list(map(sp.Integer, old)), list(map(sp.Integer, new)))
    assert found is not None
    compute = sp.lambdify(index, found, modules=[{"FloorDiv": lambda x, y: x // y, "Mod": lambda x, y: x % y}])
    for place in itertools.islice(itertools.product(*map(range, old)), 200):
        assert tuple(compute(*place)) == tuple(np.unravel_index(np.ravel_multi_index(place, old), new))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 6), st.integers(1, 12), st.integers(0, 9))
def test_division_and_remainder(a: int, c: int, offset: int, by: int, slope: int) -> None:
    i, j = PLACES[:2]
    sizes = Sizes({i: sp.Integer(a), j: sp.Integer(c)})
    x = sp.expand(slope * i + j + offset)
    quotient, rest = sizes.div(x, sp.Integer(by)), sizes.mod(x, sp.Integer(by))
    for p, r in itertools.product(range(a), range(c)):
        at = {i: p, j: r}
        value = slope * p + r + offset
        assert (quotient.subs(at), rest.subs(at)) == (value // by, value % by)


def test_symbolic_sizes() -> None:
    i, j = PLACES[:2]
    sizes = Sizes({i: n, j: sp.Integer(8)})
    assert sizes.reshape((i, j), [n, sp.Integer(8)], [8 * n]) == [8 * i + j]
    assert sizes.reshape((i,), [n], [sp.S.One, n]) == [0, i]
    assert Sizes({i: 8 * n}).reshape((i,), [8 * n], [n, sp.Integer(4), sp.Integer(2)]) is not None
    assert sizes.split(8 * i + j, sp.Integer(8)) == (i, j)
    assert sizes.bounds(i - j) == (-7, n - 1)
    assert sizes.bounds(sp.Symbol("unknown", integer=True)) is None
    assert sizes.reshape((i,), [n], [sp.Integer(4)]) is None


def test_certainty() -> None:
    assert same(n * 2, n + n)
    assert not same(n, sp.Integer(3))
    assert nonnegative(n - 1)
    assert not nonnegative(n - 2)
