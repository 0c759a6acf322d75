"""The written model against the PyTorch model: checked, loaded, run, compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.capture import Captured, Leaf, _evaluate
from attnopt.errors import ValidationError
from attnopt.onnx.require import package
from attnopt.onnx.session import Session
from attnopt.runtime.validate import Verdict, compare


def check_file(path: Path) -> None:
    """Raise `ValidationError` unless the file is a model that the ONNX checker accepts."""
    onnx = package("onnx", "checking an export")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ValidationError(f"onnx.checker refuses {path.name}: {' '.join(str(error).split())[:300]}") from error


class _Double(fx.Interpreter):
    """A graph in fp64, dtypes that it names included."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, *fx.node.map_aggregate((args, kwargs), _wide))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _wide(super().get_attr(target, args, kwargs))


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def verdict(
    original: fx.GraphModule, states: Sequence[Any], leaves: Sequence[Any], session: Session, names: Sequence[str],
    elementary: bool = False,
) -> Verdict:  # fmt: skip
    """The session's results as one vector against the graph's, by the kernel-exact contract.

    Args:
        original: the captured graph before lowering; takes `states`, then `leaves`.
        names: of the tensors among the leaves.
        elementary: whether some attention is made of elementary operators.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    found = session(names, tensors)
    with torch.no_grad():
        eager = [x.cpu() for x in original(*states, *leaves) if isinstance(x, Tensor)]
        golden = [x.cpu() for x in _Double(original).run(*map(_wide, (*states, *leaves))) if isinstance(x, Tensor)]
    if [x.shape for x in found] != [x.shape for x in eager]:
        shapes = f"{[tuple(x.shape) for x in found]} instead of {[tuple(x.shape) for x in eager]}"
        return Verdict(False, torch.inf, torch.inf, 0.0, 0.0, f"the results have the shapes {shapes}")
    if any(not x.is_floating_point() and not torch.equal(x, y) for x, y in zip(eager, found, strict=True)):
        return Verdict(False, torch.inf, torch.inf, 0.0, 0.0, "integers or truth values differ")
    floats = [i for i, x in enumerate(eager) if x.is_floating_point()]
    if not floats:
        return Verdict(True, 0.0, 0.0, 0.0, 0.0)
    joined = (torch.cat([xs[i].flatten() for i in floats]) for xs in (golden, eager, found))
    return compare(*joined, elementary=elementary)


def other_leaves(captured: Captured, leaves: Sequence[Any]) -> list[Any] | None:
    """Inputs of other sizes, made by repeating or cutting these; None if no size may vary.

    Every size is one smaller where it may be, since models have a longest input, else one larger.
    """
    sizes: dict[str, int] = {}
    for leaf, x in zip(captured.leaves, leaves, strict=True):
        if leaf.dtype is not None:
            sizes |= {n: seen for n, seen in zip(leaf.sizes, x.shape, strict=True) if _plain(n)}
    if not sizes:
        return None
    changed = {n: _another(seen, *captured.ranges.get(n, (0, 2**62))) for n, seen in sizes.items()}
    return [_resized(leaf, x, changed) for leaf, x in zip(captured.leaves, leaves, strict=True)]


def _plain(size: object) -> bool:
    return isinstance(size, str) and size.isidentifier()


def _another(size: int, low: int, high: int) -> int:
    return size - 1 if size - 1 >= max(low, 2) else min(size + 1, high)


def _resized(leaf: Leaf, x: Any, sizes: Mapping[str, int]) -> Any:
    for dim, size in enumerate(leaf.sizes if leaf.dtype is not None else ()):
        if isinstance(size, str) and set(re.findall(r"[A-Za-z_]\w*", size)) <= set(sizes):
            index = torch.arange(_evaluate(size, sizes)) % max(x.shape[dim], 1)
            x = x.index_select(dim, index)
    return x
