"""Names of an ONNX model's inputs, outputs and dynamic dimensions: those that the user's model has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture import Leaf


def parameters(model: nn.Module) -> list[str]:
    """The names of the forward's parameters."""
    return list(inspect.signature(model.forward).parameters)


def input_names(model: nn.Module, leaves: Sequence[Leaf]) -> list[str]:
    """A name for every leaf of the captured inputs: the parameter of the forward, then the path within it."""
    known, names = parameters(model), []
    for leaf in leaves:
        kind, *parts = re.findall(r"\w+", leaf.path)
        if kind == "0" and parts:
            place = int(parts[0])
            parts[0] = known[place] if place < len(known) else f"input_{place}"
        names.append("_".join(parts) or "input")
    return _distinct(names, set())


def output_names(out_spec: Any, taken: Sequence[str]) -> list[str]:
    """A name for every leaf of the model's result, apart from the names that are taken."""
    count = out_spec.num_leaves
    try:
        result = pytree.tree_unflatten(list(range(count)), out_spec)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(result)[0]]
    except Exception:  # a class that cannot hold numbers where it expects tensors
        paths = [f"[{i}]" for i in range(count)]
    found = ["_".join(re.findall(r"\w+", path)) for path in paths]
    found = [f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name for name in found]
    return _distinct(found, set(taken))


def _distinct(names: Sequence[str], taken: set[str]) -> list[str]:
    out: list[str] = []
    for name in names:
        plain, number = name, 2
        while name in taken:
            name, number = f"{plain}_{number}", number + 1
        taken.add(name)
        out.append(name)
    return out


def with_dimensions(dynamic_shapes: Any) -> Any:
    """The user's dynamic shapes as `torch.export` takes them: a name given as text is a dimension that may vary."""

    def convert(x: Any) -> Any:
        return torch.export.Dim.DYNAMIC if isinstance(x, str) else x

    return _mapped(dynamic_shapes, convert)


def _mapped(shapes: Any, convert: Any) -> Any:
    if isinstance(shapes, Mapping):
        return {name: _mapped(x, convert) for name, x in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(_mapped(x, convert) for x in shapes)
    return convert(shapes)


def dimension_names(dynamic_shapes: Any, inputs: Any, leaves: Sequence[Leaf]) -> dict[str, str]:
    """Names that the user gave, by the captured size's own: `s77` is `batch`. Empty where the two do not line up."""
    if dynamic_shapes is None:
        return {}
    found: dict[str, str] = {}
    for path, shape in _shapes(dynamic_shapes, inputs).items():
        leaf = next((x for x in leaves if x.path == path), None)
        for dim, given in shape.items():
            name = given if isinstance(given, str) else getattr(given, "__name__", "")
            size = leaf.sizes[dim] if leaf is not None and dim < len(leaf.sizes) else 0
            if isinstance(size, str) and size.isidentifier() and name and name.isidentifier():
                found.setdefault(size, name)
    return found


def _shapes(dynamic_shapes: Any, inputs: Any) -> dict[str, dict[int, Any]]:
    """Path of each tensor in `inputs`, `(args, kwargs)`, to what was said of its dimensions."""
    args, kwargs, known = inputs
    if isinstance(dynamic_shapes, Mapping):
        told = dict(dynamic_shapes)
        pairs = [(f"[0][{i}]", told.get(known[i]), x) for i, x in enumerate(args) if i < len(known)]
        pairs += [(f"[1]['{n}']", told.get(n), x) for n, x in kwargs.items()]
    else:
        everything = [(f"[0][{i}]", x) for i, x in enumerate(args)] + [(f"[1]['{n}']", x) for n, x in kwargs.items()]
        pairs = [(path, told, x) for (path, x), told in zip(everything, dynamic_shapes, strict=False)]
    found: dict[str, dict[int, Any]] = {}
    for path, told, x in pairs:
        _collect(path, told, x, found)
    return found


def _collect(path: str, told: Any, x: Any, found: dict[str, dict[int, Any]]) -> None:
    if isinstance(x, torch.Tensor):
        if isinstance(told, Mapping):
            found[path] = dict(told)
        elif isinstance(told, (list, tuple)):
            found[path] = dict(enumerate(told))
    elif isinstance(x, Mapping) and isinstance(told, Mapping):
        for name, part in x.items():
            _collect(f"{path}['{name}']", told.get(name), part, found)
    elif isinstance(x, (list, tuple)) and isinstance(told, (list, tuple)):
        for i, (part, said) in enumerate(zip(x, told, strict=False)):
            _collect(f"{path}[{i}]", said, part, found)
