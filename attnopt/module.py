"""`OptimizedModule`: the user's model with a rewritten forward, sharing its parameters."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture import Captured, share
from attnopt.errors import CaptureError, OptionError
from attnopt.graph import ADDED
from attnopt.options import Options
from attnopt.patterns.known import KNOWN
from attnopt.report import Report
from attnopt.runtime import dispatch

log = logging.getLogger("attnopt")
Slot = tuple[dict[str, Any], str]
# Methods of `transformers` that would run, or save, another model than the rewritten one.
_OF_ITS_OWN = ("generate", "save_pretrained", "push_to_hub")
_SAID: set[str] = set()


class Compiled:
    """A captured graph after rewriting, ready to run on the states of a module tree."""

    def __init__(self, captured: Captured, run: Any, tree: nn.Module, options: Options) -> None:
        self.captured = captured
        self.options = options
        self.run = run
        self.slots = [_slot(tree, name, captured) for name in captured.states]
        nodes = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
        relied = [slot for node, slot in zip(nodes, self.slots, strict=False) if KNOWN in node.meta]
        # A causal mask that is a buffer was read as a formula: it must not have changed since.
        self.relied = [(held, name, held[name], _version(held[name])) for held, name in relied]
        # The graph may read one tensor that has two names for both.
        self.tied = _tied(self.slots)
        self.parts = [(m._modules, tuple(m._modules.values())) for m in tree.modules() if m._modules]
        self.autocast = _autocast()

    @property
    def stale(self) -> bool:
        """Whether what the graph was made for is no more.

        A buffer whose values the rewriting relied on has been changed or replaced, one of two names of a tensor has
        been given another, a part of the model has been replaced, as adapters do, or `torch.autocast`, which the graph
        then holds, was active and is another now.
        """
        if any(len(held) != len(seen) or not all(map(operator.is_, held.values(), seen)) for held, seen in self.parts):
            return True
        if any(held[name] is not seen or _version(seen) != version for held, name, seen, version in self.relied):
            return True
        if any(held[name] is not other[alias] for (held, name), (other, alias) in self.tied):
            return True
        return bool(self.autocast) and self.autocast != _autocast()

    def loses_gradient(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call needs gradients and the graph has not the model's own."""
        if not self.captured.functions or not torch.is_grad_enabled():
            return False
        given = (*pytree.tree_leaves((args, kwargs)), *(held[name] for held, name in self.slots))
        return any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = self.captured.flatten(args, kwargs)
        states = [held[name] for held, name in self.slots]
        with dispatch.use(self.options):
            results = self.run(*states, *leaves)
        return pytree.tree_unflatten(list(results), self.captured.out_spec)


class AsItIs:
    """In the place of a graph: the original model, where no graph may take its place."""

    stale = False

    def __init__(self, fast: OptimizedModule) -> None:
        self.source = fast._source

    def loses_gradient(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """The model has its own gradient."""
        return False

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.source(*args, **kwargs)


def _version(tensor: Any) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)


def _tied(slots: list[Slot]) -> list[tuple[Slot, Slot]]:
    """Each further name of a state beside its first."""
    first: dict[int, Slot] = {}
    pairs = ((first.setdefault(id(held[name]), (held, name)), (held, name)) for held, name in slots)
    # The states' mappings are told apart by identity: to compare them would compare tensors.
    return [(one, other) for one, other in pairs if one[0] is not other[0] or one[1] != other[1]]


def _autocast() -> tuple[Any, ...]:
    """The device types under `torch.autocast` and their dtypes; empty where it is not active."""
    active = (d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    return tuple((d, torch.get_autocast_dtype(d)) for d in active)


def _slot(tree: nn.Module, name: str, captured: Captured) -> Slot:
    """Where a state lives: looked up at every call, so that moved or loaded states are seen."""
    owner_name, _, leaf = name.rpartition(".")
    try:
        owner = tree.get_submodule(owner_name)
    except AttributeError:
        return dict(captured.constants), name
    for held in (owner._parameters, owner._buffers):
        if leaf in held:
            return held, leaf  # type: ignore[return-value]
    return dict(captured.constants), name


class OptimizedModule(nn.Module):
    """A model whose attention was rewritten.

    Parameters and buffers keep their names and are the original's own tensors (rewritten ones excepted), so
    training, `state_dict`, `load_state_dict` and `.to` work as on the original. The forward is captured for
    training and for evaluation separately, when each is first called. Attributes that are not found here are
    looked up on a copy of the original, so `fast.config` works. A part whose mode differs is captured anew, and so is
    the model where a part of this module has been replaced. Numbers and flags of the code, and hooks, are those of
    the capture; what becomes of the original's attributes later is not seen.
    """

    report: Report

    def __init__(self, model: nn.Module, build: Any) -> None:
        super().__init__()
        source = share(model)
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, held, getattr(source, held))
        self.training = source.training
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_build", build)
        object.__setattr__(self, "_compiled", {})
        object.__setattr__(self, "_parts", tuple(source.modules())[1:])
        object.__setattr__(self, "_decisions", None)
        self.report = Report(model=type(model).__name__, notes=("not captured yet: the first call captures",))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's forward returns, of the same type."""
        compiled = self._compiled.get(self._modes())
        if compiled is None or compiled.stale:
            if torch.compiler.is_compiling():
                return self._traced(args, kwargs)
            compiled = self.compile_for(args, kwargs)
        if compiled.loses_gradient(args, kwargs) and full_size(self) is self._source:
            self._source.training = self.training
            return self._source(*args, **kwargs)
        return compiled(args, kwargs)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inside of another capture, before a graph of its own was made: the original, where it computes the same."""
        if any(decision.sites for decision in self._decisions or ()):
            raise CaptureError("a model after approximate rewrites must be called once before it is traced.")
        self._source.training = self.training
        return self._source(*args, **kwargs)

    def compile_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Capture, rewrite and validate for these inputs in the present mode."""
        self._source.training = self.training
        object.__setattr__(self, "_parts", tuple(self._source.modules())[1:])
        compiled, report = self._build(self, args, kwargs)
        self._compiled[self._modes()] = compiled
        self.report = report
        return compiled

    def _modes(self) -> tuple[bool, ...]:
        """Which modules are in training mode: the module itself, and each part of the model."""
        return (self.training, *[part.training for part in self._parts])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = self.__dict__.get("_source")
            if source is None or name.startswith("__"):
                raise
            found = getattr(source, name)
            decisions = self.__dict__.get("_decisions") or ()
            done = [decision.rewrite for decision in decisions if decision.sites]
            return _before(name, found, done) if done and isinstance(found, MethodType) else found

    def __reduce__(self) -> Any:
        return _restore, (self._source, self._build, self.training, self._decisions)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        import copy

        return _restore(copy.deepcopy(self._source, memo), self._build, self.training, self._decisions)

    def adopt(self, decisions: tuple[Any, ...], tensors: Mapping[str, Any]) -> None:
        """Remember what approximate rewrites decided.

        Parameters that they made smaller are taken under their old names, tensors that they added as parameters
        or buffers of the submodule `attnopt`.
        """
        object.__setattr__(self, "_decisions", decisions)
        _take_in(self._source, {name: t for name, t in tensors.items() if name.startswith(f"{ADDED}.")})
        for name in {cut[0] for decision in decisions for cut in decision.cuts}:
            owner, _, leaf = name.rpartition(".")
            self._source.get_submodule(owner)._parameters[leaf] = tensors[name]

    def added(self) -> dict[str, torch.Tensor]:
        """The tensors that approximate rewrites added, by name."""
        states = (*self._source.named_parameters(), *self._source.named_buffers())
        return {name: tensor for name, tensor in states if name.startswith(f"{ADDED}.")}


def _before(name: str, method: MethodType, done: list[str]) -> Any:
    """A method of the original, whose code knows nothing of the rewrites that changed the model."""
    names = ", ".join(dict.fromkeys(done))
    if name not in _OF_ITS_OWN:
        note = f"{name} is the original's own method: where it runs the model, it runs it without {names}"
        if note not in _SAID:
            _SAID.add(note)
            log.warning("%s.", note)
        return method

    def refuse(*_: Any, **__: Any) -> Any:
        raise OptionError(
            f"{name} is the original's own method and knows nothing of {names}: call the optimised module itself or, "
            "after ShareKV and PruneHeads, take attnopt.standalone(model, args, kwargs), which has that method."
        )

    return refuse


def _take_in(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Register tensors under their dotted names, in modules that are made for them."""
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = model
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)


def _restore(
    source: nn.Module, build: Any, training: bool, decisions: tuple[Any, ...] | None = None
) -> OptimizedModule:
    """A saved module: it captures again at its first call, since kernels and graphs are not saved."""
    fresh = OptimizedModule(source, build)
    object.__setattr__(fresh, "_decisions", decisions)
    return fresh.train(training)


def full_size(fast: OptimizedModule) -> nn.Module:
    """The module to capture: the original's code needs parameters of the original's shapes, whatever their values.

    It does not see what rewrites added either: code that walks its children, as `nn.Sequential` does, would run it.
    """
    if ADDED not in fast._source._modules and not any(decision.cuts for decision in fast._decisions or ()):
        return fast._source  # type: ignore[no-any-return]
    source, done = share(fast._source), set()
    source._modules.pop(ADDED, None)
    for name, _, _, shape in (cut for decision in fast._decisions for cut in decision.cuts):
        if name not in done:
            owner, _, leaf = name.rpartition(".")
            held = source.get_submodule(owner)._parameters
            small = held[leaf]
            assert small is not None
            held[leaf] = nn.Parameter(small.new_empty(shape), small.requires_grad)
            done.add(name)
    return source
