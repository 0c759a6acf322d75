"""Any model to one normal form: a pre-dispatch aten `fx.Graph` with parameters by name.

The only user of `torch.export` and of Dynamo's graphs. Knows nothing of attention.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt.errors import CaptureError, ShapeError
from attnopt.exporting import check_shapes, export
from attnopt.graph import normalize, value

log = logging.getLogger("attnopt")


@dataclass(frozen=True)
class Leaf:
    """What one flattened input must look like: a tensor's dtype, device and sizes, or a constant."""

    path: str
    constant: object = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    sizes: tuple[int | str, ...] = ()
    used: bool = True


@dataclass(frozen=True)
class Captured:
    """A model as a graph. Placeholders: the states by name, then the flattened inputs.

    `states` are qualified names of parameters and buffers; `constants` are tensors that the trace made. `functions`
    names the `torch.autograd.Function`s whose forward, and not their own gradient, is in the graph; `parameters` are
    those of the model's forward that may be given by position.
    """

    gm: fx.GraphModule
    states: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    leaves: tuple[Leaf, ...]
    ranges: Mapping[str, tuple[int, int]]
    in_spec: Any
    out_spec: Any
    training: bool
    functions: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def scalars(self) -> dict[str, torch.Tensor]:
        """Scalars that the trace made, by placeholder name: nobody can change them between calls."""
        names = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        held = zip(names, self.states, strict=False)
        return {
            str(n.target): self.constants[s] for n, s in held if s in self.constants and not self.constants[s].dim()
        }

    def tables(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Matrices and larger tensors that are buffers of the model or made by the trace, by placeholder name."""
        names = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        held = {**dict(model.named_buffers()), **self.constants}
        return {
            str(n.target): held[s] for n, s in zip(names, self.states, strict=False) if s in held and held[s].dim() > 1
        }

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The inputs, by position or by name, as the graph takes them. Raises `ShapeError` if others were captured."""
        leaves, spec = _flat(self.in_spec, args, kwargs)
        if spec != self.in_spec:
            leaves, spec = _flat(self.in_spec, *self._by_name(args, kwargs))
        if spec != self.in_spec:
            asked, saw = _arrangement(self.in_spec), _arrangement(pytree.tree_structure((tuple(args), dict(kwargs))))
            if asked == saw:
                asked, saw = str(self.in_spec), str(spec)
            raise ShapeError(
                f"the inputs are arranged differently from those captured: asked for {asked}, saw {saw}. "
                "Call with the same arguments, or call attnopt.optimize again with these."
            )
        check_inputs(self.leaves, self.ranges, leaves)
        return leaves

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The same inputs, as many of them by position as were captured so, where their names are known."""
        known = self.parameters[: len(args)]
        if len(known) < len(args) or set(known) & set(kwargs):
            return args, kwargs
        named = {**dict(zip(known, args, strict=True)), **kwargs}
        first = self.parameters[: _children(self.in_spec)[0].num_children]
        if set(first) - set(named):
            return args, kwargs
        return [named.pop(name) for name in first], named


def share(model: nn.Module) -> nn.Module:
    """A structural copy of the model that shares its parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be copied: {error}. Give its modules a deepcopy.") from error


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None) -> Captured:
    """Capture by `torch.export`. Raises `CaptureError` when the model cannot be exported."""
    _check_devices(model, args, kwargs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apart, named = _apart(args, kwargs)
            program, functions = export(model, apart, named, dynamic_shapes)
    except Exception as error:
        check_shapes(error, dynamic_shapes, model)
        said = (str(error).strip().splitlines() or [""])[0]
        names = f"{type(model).__name__}: {type(error).__name__}"
        raise CaptureError(f"torch.export could not capture {names}: {said}") from error
    if functions and model.training:
        raise CaptureError(
            f"{type(model).__name__} calls {', '.join(sorted(functions))}, a torch.autograd.Function, and torch.export "
            "would replace its gradient by that of its forward."
        )
    captured = _from_program(program, model.training, (apart, named))
    return replace(captured, functions=tuple(sorted(functions)), parameters=_parameters(model))


def _parameters(model: nn.Module) -> tuple[str, ...]:
    found = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with every repeated tensor copied: given twice, one tensor would be traced as one input for good."""
    seen: set[int] = set()

    def copy_repeated(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        repeated = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if repeated else leaf

    return pytree.tree_map(copy_repeated, (args, kwargs))  # type: ignore[return-value]


def _from_program(program: torch.export.ExportedProgram, training: bool, given: tuple[Any, dict[str, Any]]) -> Captured:
    signature, gm = program.graph_signature, program.graph_module
    kinds = torch.export.graph_signature.InputKind
    states: list[str] = []
    constants: dict[str, torch.Tensor] = {}
    inputs: list[fx.Node] = []
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(nodes, signature.input_specs, strict=True):
        if spec.kind in (kinds.PARAMETER, kinds.BUFFER):
            states.append(str(spec.target))
        elif spec.kind is kinds.CONSTANT_TENSOR:
            constants[str(spec.target)] = program.constants[spec.target]
            states.append(str(spec.target))
        elif spec.kind is kinds.USER_INPUT:
            inputs.append(node)
        else:
            raise CaptureError(f"the captured graph takes an input of kind {spec.kind.name}, which attnopt cannot run.")
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    args, kwargs = given
    # Of the inputs themselves: what holds tensors of its own, such as a cache, is not made of nodes.
    arranged = tuple(args), dict(_in_order(in_spec, kwargs))
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(arranged)[0]]
    leaves = tuple(
        _leaf(path, node, spec)
        for path, node, spec in zip(
            paths, inputs, [s for s in signature.input_specs if s.kind is kinds.USER_INPUT], strict=True
        )
    )
    bounds = program.range_constraints.items()
    ranges = {str(s): (int(max(r.lower, -(2**62))), int(min(r.upper, 2**62))) for s, r in bounds}
    return Captured(normalize(gm), tuple(states), constants, leaves, ranges, in_spec, out_spec, training)


def _leaf(path: str, node: fx.Node, spec: Any) -> Leaf:
    seen = value(node)
    if isinstance(seen, torch.Tensor):
        sizes = tuple(x if isinstance(x, int) else str(x.node.expr) for x in seen.shape)
        return Leaf(path, None, seen.dtype, seen.device, sizes, bool(node.users))
    constant = getattr(spec.arg, "value", seen)
    return Leaf(path, constant)


def check_inputs(leaves: Sequence[Leaf], ranges: Mapping[str, tuple[int, int]], given: Sequence[Any]) -> None:
    """Raise `ShapeError` at the first input that differs from what was captured."""
    bound: dict[str, int] = {}
    derived: list[tuple[Leaf, int, str, int]] = []
    for leaf, seen in zip(leaves, given, strict=True):
        if leaf.dtype is None:
            if isinstance(leaf.constant, (int, float, str, bool, type(None))) and seen != leaf.constant:
                raise ShapeError(
                    f"input {leaf.path} was captured as the constant {leaf.constant!r}; saw {seen!r}. "
                    "Call attnopt.optimize again with this value."
                )
            continue
        if not isinstance(seen, torch.Tensor):
            raise ShapeError(f"input {leaf.path} must be a tensor; saw {type(seen).__name__}.")
        if seen.dtype != leaf.dtype or seen.device != leaf.device or seen.dim() != len(leaf.sizes):
            raise ShapeError(
                f"input {leaf.path} was captured as {leaf.dtype} on {leaf.device} with {len(leaf.sizes)} dimensions; "
                f"saw {seen.dtype} on {seen.device} with {seen.dim()}. Move or cast it, or optimize again with it."
            )
        for dim, (asked, size) in enumerate(zip(leaf.sizes, seen.shape, strict=True)):
            if isinstance(asked, int):
                if asked != size:
                    raise _size_error(leaf, dim, str(asked), size)
            elif asked.isidentifier():
                _bind(leaf, dim, asked, size, bound, ranges)
            else:
                derived.append((leaf, dim, asked, size))
    for leaf, dim, asked, size in derived:
        if _evaluate(asked, bound) != size:
            raise _size_error(leaf, dim, asked, size)


def _bind(leaf: Leaf, dim: int, name: str, size: int, bound: dict[str, int], ranges: Any) -> None:
    low, high = ranges.get(name, (0, 2**62))
    if bound.setdefault(name, size) != size:
        raise _size_error(leaf, dim, f"{bound[name]}, as another input has", size)
    if not low <= size <= high:
        raise _size_error(leaf, dim, f"between {low} and {high}", size)


def _size_error(leaf: Leaf, dim: int, asked: str, size: int) -> ShapeError:
    return ShapeError(
        f"dimension {dim} of input {leaf.path} must be {asked}; saw {size}. "
        "Pass dynamic_shapes to attnopt.optimize to let it vary, or optimize again with this shape."
    )


def _evaluate(text: str, bound: Mapping[str, int]) -> int:
    """A size such as `2*s0 + 1`, by arithmetic on a parsed tree."""
    import ast

    def walk(node: ast.AST) -> int:
        match node:
            case ast.Expression():
                return walk(node.body)
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name):
                return bound[name]
            case ast.BinOp(left=x, op=ast.Add(), right=y):
                return walk(x) + walk(y)
            case ast.BinOp(left=x, op=ast.Sub(), right=y):
                return walk(x) - walk(y)
            case ast.BinOp(left=x, op=ast.Mult(), right=y):
                return walk(x) * walk(y)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return -walk(x)
        raise ShapeError(f"the captured size {text!r} cannot be checked.")

    return walk(ast.parse(text, mode="eval"))


def _children(in_spec: Any) -> tuple[Any, Any]:
    """The specs of the arguments by position and of those by name."""
    positional, named = (in_spec.child(i) for i in (0, 1)) if hasattr(in_spec, "child") else in_spec.children_specs
    return positional, named


def _in_order(in_spec: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    names = list(_children(in_spec)[1].context)
    return {n: kwargs[n] for n in names} if set(names) == set(kwargs) else kwargs


def _flat(in_spec: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    return pytree.tree_flatten((tuple(args), dict(_in_order(in_spec, kwargs))))


def _arrangement(spec: Any) -> str:
    """How many arguments are given by position, and which ones by name, in words."""
    positional, named = _children(spec)
    count, names = positional.num_children, ", ".join(named.context)
    by_name = f"by name {names}" if names else "none by name"
    return f"{count or 'no'} argument{'' if count == 1 else 's'} by position and {by_name}"


def _check_devices(model: nn.Module, args: Any, kwargs: Any) -> None:
    devices = {p.device for p in model.parameters()}
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and len(devices) == 1 and leaf.device not in devices and leaf.dim() > 0:
            raise ShapeError(
                f"the model is on {next(iter(devices))} but an input of shape {tuple(leaf.shape)} is on {leaf.device}. "
                "Move one of them."
            )
