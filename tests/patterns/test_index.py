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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 8))
def test_digits_are_put_together_again(a: int, c: int, inner: int, outer: int, offset: int) -> None:
    """A shift between two reshapes, as in the relative shift of Transformer-XL."""
    i, j = PLACES[:2]
    sizes = Sizes({i: sp.Integer(a), j: sp.Integer(c)})
    rows = -(-(a * c + offset) // inner) + 1
    first = [sizes.div(i * c + j, sp.Integer(inner)) + offset, sizes.mod(i * c + j, sp.Integer(inner))]
    count = (rows + offset) * inner
    new = [-(-count // outer), outer]
    found = sizes._regroup(first, [sp.Integer(rows + offset), sp.Integer(inner)], list(map(sp.Integer, new)))
    for p, r in itertools.product(range(a), range(c)):
        flat = p * c + r + offset * inner
        at = {i: p, j: r}
        expected = (0 if new[0] == 1 else flat // outer, 0 if new[1] == 1 else flat % outer if new[0] > 1 else flat)
        assert tuple(int(x.subs(at)) for x in found) == expected


def test_relative_shift_is_a_distance() -> None:
    i, j = PLACES[:2]
    sizes = Sizes({i: sp.Integer(16), j: sp.Integer(16)})
    shape, wide = [sp.Integer(31), sp.Integer(16)], [sp.Integer(16), sp.Integer(32)]
    first = sizes._regroup((i, j), [sp.Integer(16), sp.Integer(31)], shape)
    assert sizes._regroup((first[0] + 1, first[1]), [sp.Integer(32), sp.Integer(16)], wide) == [i, j - i + 16]
