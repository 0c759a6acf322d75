"""Capture: the normal form, and what calls are refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import attnopt
from attnopt.capture import Leaf, capture, check_inputs, share
from attnopt.errors import CaptureError, OptionError, ShapeError
from tests.modules import Function, SelfAttention, captured, replay

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def test_states_come_first_and_by_name() -> None:
    model = SelfAttention()
    graph = capture(model, (X,), {})
    assert graph.states[:4] == ("qkv.weight", "qkv.bias", "out.weight", "out.bias")
    states = dict(model.named_parameters())
    (out,) = graph.gm(*[states.get(s, graph.constants.get(s)) for s in graph.states], X)
    assert torch.equal(out, model(X))


def test_scalars_are_constants_that_the_trace_made() -> None:
    graph = captured(lambda x: x * torch.tensor(3.0), X)
    assert [t.item() for t in graph.scalars.values()] == [3.0]
    assert torch.equal(replay(graph, X)[0], X * 3)


def test_sharing_copies_the_structure_and_not_the_tensors() -> None:
    model = SelfAttention()
    twin = share(model)
    assert twin.qkv is not model.qkv
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_a_model_that_cannot_be_copied_says_so() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("never")

    with pytest.raises(CaptureError, match="cannot be copied: never"):
        share(Stubborn())


BATCH = (Dim("B", min=1, max=8),)
CALLS = (
    ((X[:, :4],), {}, "dimension 1 of input .* must be 5; saw 4"),
    ((X.double(),), {}, "captured as torch.float32 .* saw torch.float64"),
    ((X[0],), {}, "3 dimensions; saw .* 2"),
    ((X, X), {}, "asked for 1 argument by position and none by name, saw 2 arguments by position and none by name"),
    ((X,), {"keep": None}, "arranged differently"),
    ((X.to("meta"),), {}, "on cpu .* on meta"),
    ((3,), {}, "must be a tensor; saw int"),
    ((torch.randn(9, 5, 16),), {}, "between 1 and 8; saw 9"),
)


@pytest.mark.parametrize(("args", "kwargs", "message"), CALLS, ids=[c[2][:18] for c in CALLS])
def test_other_inputs_than_captured(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    fast = attnopt.optimize(SelfAttention().eval(), (X,), dynamic_shapes=({0: BATCH[0]},), validate=False)
    with pytest.raises(ShapeError, match=message):
        fast(*args, **kwargs)


def test_arguments_by_name_or_by_position() -> None:
    model, keep = SelfAttention().eval(), torch.ones(2, 5, dtype=torch.bool)
    by_position = attnopt.optimize(model, (X, keep), validate=False)
    by_name = attnopt.optimize(model, (), {"x": X, "keep": keep}, validate=False)
    with torch.no_grad():
        wanted = by_position(X, keep)
        for fast in (by_position, by_name):
            assert torch.equal(fast(keep=keep, x=X), wanted)
            assert torch.equal(fast(X, keep=keep), wanted)
            with pytest.raises(ShapeError, match="saw 1 argument by position and by name x"):
                fast(X, x=X)
            with pytest.raises(ShapeError, match="saw no arguments by position and by name keep, y"):
                fast(keep=keep, y=X)


def test_constants_are_part_of_the_capture() -> None:
    fast = attnopt.optimize(Function(lambda x, scale: (x @ x.mT * scale).softmax(-1) @ x), (X, 2), validate=False)
    torch.testing.assert_close(fast(X, 2), (X @ X.mT * 2).softmax(-1) @ X)
    with pytest.raises(ShapeError, match="captured as the constant 2; saw 3"):
        fast(X, 3)


def test_sizes_that_hang_together() -> None:
    x = Leaf("x", None, torch.float32, torch.device("cpu"), ("s0", "2*s0 + 1"))
    y = Leaf("y", None, torch.float32, torch.device("cpu"), ("s0",))
    check_inputs((x, y), {"s0": (2, 4)}, [torch.ones(3, 7), torch.ones(3)])
    for sizes, message in (
        ((3, 6), "2\\*s0 \\+ 1; saw 6"),
        ((5, 11), "between 2 and 4"),
        ((2, 5), "as another input has"),
    ):
        with pytest.raises(ShapeError, match=message):
            check_inputs((x, y), {"s0": (2, 4)}, [torch.ones(sizes), torch.ones(3)])


@pytest.mark.parametrize("shapes", [{"y": ({0: BATCH[0]},)}, ({0: BATCH[0]}, None)], ids=["name", "count"])
def test_dynamic_shapes_of_another_structure_are_an_error(shapes: object) -> None:
    with pytest.raises(OptionError, match="dynamic_shapes does not fit the inputs of SelfAttention"):
        attnopt.optimize(SelfAttention().eval(), (X,), dynamic_shapes=shapes)


def test_dynamic_batch_and_length() -> None:
    model = SelfAttention().eval()
    shapes = ({0: Dim("B", min=1, max=64), 1: Dim("N", min=2, max=64)},)
    fast = attnopt.optimize(model, (X,), dynamic_shapes=shapes, strict=True)
    for batch, length in ((1, 2), (3, 17), (2, 5)):
        x = torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(fast(x), model(x))


class Held:
    """A cache that makes a tensor of its own when it is built: one cannot be built of anything but tensors."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self.room = keys, torch.zeros(2, dtype=keys.dtype)


def test_inputs_that_hold_tensors_are_captured_and_named() -> None:
    pytree.register_pytree_node(
        Held, lambda held: ([held.keys], None), lambda kept, _: Held(*kept),
        flatten_with_keys_fn=lambda held: ([(pytree.GetAttrKey("keys"), held.keys)], None),
    )  # fmt: skip
    graph = capture(Function(lambda x, held: (x + held.keys, Held(held.keys * 2))), (X, Held(X)), {})
    assert [leaf.path for leaf in graph.leaves] == ["[0][0]", "[0][1].keys"]
    found = replay(graph, X, X)
    assert torch.equal(found[1], X * 2)
