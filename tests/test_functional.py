"""In-place code computes the same after it was made pure: rows of known traps, and random programs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnopt
from attnopt.aliasing import mutated_argument
from attnopt.capture import Captured
from attnopt.errors import Decline
from attnopt.functional import WRITES
from attnopt.patterns import find
from tests.modules import Function, captured, replay

Tensors = tuple[torch.Tensor, ...]


def _view_before_write(y: torch.Tensor) -> Tensors:
    v = y[0]
    y += 1
    return v, y


def _view_of_view(y: torch.Tensor) -> Tensors:
    v = y[0]
    w = v[1:]
    w.mul_(3)
    return y, v, w


def _two_views(y: torch.Tensor) -> Tensors:
    v, w = y[0], y[:, 1]
    v += 1
    w *= 2
    return y, v, w


def _reads_between(y: torch.Tensor) -> Tensors:
    v = y[0]
    a = v.sum()
    v += 1
    b = v.sum()
    y *= 2
    return a, b, v.sum(), y


def _stale_views(y: torch.Tensor) -> Tensors:
    v, w = y[0], y[0]
    v += 1
    y[0] = w * 2
    w -= 1
    return v, w, y


def _through(view: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], Tensors]:
    def run(y: torch.Tensor) -> Tensors:
        v = view(y)
        v[0] = 7
        v += y.sum()
        return y, v

    return run


def _itself(y: torch.Tensor) -> Tensors:
    y.transpose(0, 1)[0].add_(y[0, 1])
    y.add_(y)
    return (y,)


def _result_is_the_tensor(y: torch.Tensor) -> Tensors:
    v = y[0]
    w = v.add_(1)
    w.mul_(2)
    y.sub_(1)
    return y, w, v


def _swap(y: torch.Tensor) -> Tensors:
    a = y[0].clone()
    y[0] = y[1]
    y[1] = a
    return (y,)


def _types(y: torch.Tensor) -> Tensors:
    n, half = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.bfloat16)
    n[1] = y[0, 0]
    half += y[0]
    n += 2
    return n, half


def _reshaped_object(y: torch.Tensor) -> Tensors:
    v = y[0]
    y.unsqueeze_(0)
    y.transpose_(1, 2)
    y[0, 0] += 1
    return y, v


def _index_put(y: torch.Tensor) -> Tensors:
    v = y[0]
    y[:, torch.tensor([0, 2])] = 9.0
    y[y < 0] *= 2
    return y, v


def _shape_of_a_mask(y: torch.Tensor) -> Tensors:
    mask, count = torch.zeros(2, 3, 4), 0
    for rows in (slice(0, -1), slice(-1, None)):
        for columns in (slice(0, -2), slice(-2, None)):
            mask[:, rows, columns] = count
            count += 1
    return (mask + y,)


def _split(y: torch.Tensor) -> Tensors:
    a, b = y.split(2, -1)
    b[0] = 1
    c = a + b
    y.mul_(3)
    return a, b, c, y


def _unbind(y: torch.Tensor) -> Tensors:
    a, b = y.unbind(0)
    b.zero_()
    a.copy_(b + 1)
    return a, b, y


def _nothing_recorded(y: torch.Tensor) -> Tensors:
    with torch.no_grad():
        y += 1
        v = y[0]
        v *= 2
    y[1] += 3
    return y, v


def _memory_order(y: torch.Tensor) -> Tensors:
    v, w = torch.as_strided(y, (4,), (1,)), y.unfold(-1, 2, 2)
    v += 1
    w[..., 0] = 0
    return y, v, w


def _bits(y: torch.Tensor) -> Tensors:
    y.view(torch.int32)[0] = 0
    return (y,)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda y: y[:, 1:], "step": lambda y: y[..., ::2], "select": lambda y: y[-1], "transpose": lambda y: y.mT,
    "permute": lambda y: y.permute(2, 0, 1), "swapaxes": lambda y: y.swapaxes(0, -1), "movedim": lambda y: y.movedim(0, -1),
    "view": lambda y: y.view(6, 4), "reshape": lambda y: y.reshape(-1), "copying_reshape": lambda y: y.mT.reshape(-1),
    "unsqueeze": lambda y: y.unsqueeze(1), "squeeze": lambda y: y[:, :1].squeeze(1), "flatten": lambda y: y.flatten(1),
    "unflatten": lambda y: y.unflatten(-1, (2, 2)), "narrow": lambda y: y.narrow(1, 1, 2), "detach": lambda y: y.detach(),
    "contiguous": lambda y: y.contiguous(), "copying_contiguous": lambda y: y.mT.contiguous(), "to": lambda y: y.float(),
    "copying_to": lambda y: y.double(), "clone": lambda y: y.clone(), "diagonal": lambda y: y[0].diagonal(),
    "chunk": lambda y: y.chunk(2, -1)[1], "chain": lambda y: y.view(2, 12).view(2, 4, 3).transpose(1, 2)[0],
}  # fmt: skip
TRAPS = (
    _view_before_write, _view_of_view, _two_views, _reads_between, _stale_views, _itself, _result_is_the_tensor, _swap,
    _types, _reshaped_object, _index_put, _shape_of_a_mask, _split, _unbind, _nothing_recorded, _memory_order, _bits,
)  # fmt: skip
RUNS = [(f.__name__.strip("_"), f) for f in TRAPS] + [(f"through_{n}", _through(v)) for n, v in VIEWS.items()]

# Written through a memory layout, or through a tensor that autograd no longer follows.
LEFT = ("memory_order", "bits", "through_diagonal", "through_detach", "nothing_recorded")


def _same(run: Callable[..., Any], x: torch.Tensor) -> Captured:
    expected, mine, example = x.clone(), x.clone(), x.clone()
    want = run(expected)
    graph = captured(run, example)
    got = replay(graph, mine)
    assert len(got) == len(want)
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    return graph


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[name for name, _ in RUNS])
def test_changes_of_what_the_graph_made(name: str, run: Callable[..., Any]) -> None:
    graph = _same(lambda x: run(x * 1), torch.randint(-4, 5, (2, 3, 4)).float())
    left = [n for n in graph.gm.graph.nodes if mutated_argument(n) is not None]
    assert bool(left) == (name in LEFT), left


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[name for name, _ in RUNS])
def test_changes_of_an_input_reach_the_caller(name: str, run: Callable[..., Any]) -> None:
    if name == "reshaped_object":
        return  # torch.export refuses a changed shape of an input.
    graph = _same(run, torch.randint(-4, 5, (2, 3, 4)).float())
    assert all(node.meta[WRITES] for node in graph.gm.graph.nodes if mutated_argument(node) is not None)


def _step(choose: random.Random, values: list[torch.Tensor]) -> torch.Tensor:
    """A view of a value, or a value after a write to it."""
    y = choose.choice([v for v in values if v.dim()])
    dim = choose.randrange(y.dim())
    at = choose.randrange(y.shape[dim])
    step: Callable[[], torch.Tensor] = choose.choice([
        lambda: y.select(dim, at), lambda: y.narrow(dim, at, y.shape[dim] - at), lambda: y.transpose(dim, 0),
        lambda: y.reshape(-1), lambda: y.unsqueeze(dim), lambda: y.clone(), lambda: y.contiguous(),
        lambda: y.split(max(1, y.shape[dim] // 2), dim)[0], lambda: y.add_(2), lambda: y.mul_(-1),
        lambda: y.masked_fill_(y > 0, -3), lambda: y.add_(choose.choice(values).sum().sign()),
        lambda: y.copy_(y.flip(dim) * 2), lambda: y.select(dim, at).fill_(5), lambda: y.permute(*reversed(range(y.dim()))),
    ])  # fmt: skip
    return step()


def _program(seed: int) -> Callable[[torch.Tensor], Tensors]:
    """A random mix of views and writes."""

    def run(x: torch.Tensor) -> Tensors:
        choose = random.Random(seed)
        values = [x * 1, x * 2]
        for _ in range(choose.randint(4, 14)):
            values.append(_step(choose, values))
        return tuple(values)

    return run


@pytest.mark.parametrize("seed", range(25))
def test_random_programs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _same(_program(seed), torch.randint(-4, 5, (2, 3, 4), generator=generator).float())


def test_a_write_between_reading_and_the_end_of_an_attention_declines_it() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT + bias
        bias.add_(1)
        return scores.softmax(-1) @ k

    inputs = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(3, 3)
    (site,) = find(captured(run, *inputs).gm.graph)
    assert isinstance(site[2], Decline)
    assert "changed in place" in site[2].reason


def test_a_cache_that_is_written_before_it_is_read_keeps_the_site() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(2, torch.tensor([1, 2, 4]), k)
        return (q @ cache.mT).softmax(-1) @ cache

    inputs = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 6, 4)
    (site,) = find(captured(run, *inputs).gm.graph)
    assert str(site[2].spec) == "2 heads, d=4; score s"  # type: ignore[union-attr]


def test_what_was_computed_before_a_write_is_loaded() -> None:
    """A counter of a static cache is advanced between the mask that reads it and the attention."""

    def run(q: torch.Tensor, k: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        last = count + torch.arange(q.shape[2])
        count.add_(q.shape[2])
        keep = torch.arange(k.shape[2])[None, :] <= last[:, None]
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ k

    inputs = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 9, 4)
    fast = attnopt.optimize(Function(run), (*inputs, torch.tensor(2)), strict=True, options={"kernel": "reference"})
    counts = torch.tensor(4), torch.tensor(4)
    torch.testing.assert_close(fast(*inputs, counts[0]), run(*inputs, counts[1]))
    assert counts[0] == counts[1] == 7
