"""Graphs inside graphs: the bodies of higher-order operators, and the precision that `torch.autocast` gives a node."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental import proxy_tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

AUTOCAST = "attnopt_autocast"

# Operators whose bodies run on tensors as any graph does, so that what is inside may be rewritten like the rest.
_OPEN = {
    "wrap_with_autocast": "a region under torch.autocast",
    "tag_activation_checkpoint": "a checkpointed region",
    "wrap_activation_checkpoint": "a checkpointed region",
    "cond": "a branch of torch.cond",
    "map_impl": "a mapped function",
    "scan": "a scanned function",
    "while_loop": "the body of a while loop",
}
# Operators that are attention themselves: their bodies change a score or make a mask.
_OWN = {"flex_attention", "flex_attention_backward"}


@dataclass(frozen=True)
class Body:
    """A graph that an operator of another graph runs.

    Attributes:
        name: the attribute of `outer` that holds it.
        gm, outer: the body's module and the module around it.
        call: the node that runs it.
        closed: why attention in it stays as it is; empty if it may be rewritten.
    """

    name: str
    gm: fx.GraphModule
    outer: fx.GraphModule
    call: fx.Node
    closed: str = ""


def bodies(gm: torch.nn.Module | None) -> Iterator[Body]:
    """Every body that the graph's own operators run, each once, in graph order."""
    seen: set[int] = set()
    for node in gm.graph.nodes if isinstance(gm, fx.GraphModule) else ():
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        kind = node.target.name()
        for source in node.all_input_nodes if kind not in _OWN else ():
            body = _held(gm, source)
            if body is not None and id(body) not in seen:
                seen.add(id(body))
                closed = "" if kind in _OPEN else f"attention inside {kind} stays as it is"
                yield Body(str(source.target), body, gm, node, closed)


def everywhere(gm: torch.nn.Module | None) -> Iterator[Body]:
    """The bodies, the bodies in them, and so on; what is inside a closed one is closed as well."""
    for body in bodies(gm):
        yield body
        for inner in everywhere(body.gm):
            yield Body(inner.name, inner.gm, inner.outer, inner.call, body.closed or inner.closed)


def _held(gm: Any, node: fx.Node) -> fx.GraphModule | None:
    found = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
    return found if isinstance(found, fx.GraphModule) else None


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with nodes of its own, and so for every body; parameters and constants are shared."""
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, fresh)
    for body in bodies(copy):
        setattr(copy, body.name, copied(body.gm))
    return copy


def name_apart(body: Body) -> None:
    """Give the body's nodes names that occur nowhere else, so that a site's name says which it is."""
    for node in body.gm.graph.nodes:
        node._rename(f"{body.name}_{node.name}")


def forget_default_recompute(gm: fx.GraphModule) -> None:
    """Take the tracer's default off the checkpointed bodies again: there it looks like one that the user gave."""
    for body in everywhere(gm):
        if body.gm.meta.get("_checkpoint_context_fn") is _RECOMPUTE:
            del body.gm.meta["_checkpoint_context_fn"]


def mark_autocast(gm: fx.GraphModule, around: Mapping[str, torch.dtype] | None = None) -> None:
    """Note on every node under `torch.autocast`, in `meta`, the dtype by type of device."""
    stack: list[Mapping[str, torch.dtype]] = [around or {}]
    inner = {id(body.call): [] for body in bodies(gm)}  # type: dict[int, list[Body]]
    for body in bodies(gm):
        inner[id(body.call)].append(body)
    for node in gm.graph.nodes:
        if node.target is _enter_autocast:
            stack.append(_changed(stack[-1], *node.args[:3]))
        elif node.target is _exit_autocast and len(stack) > 1:
            stack.pop()
        elif stack[-1]:
            node.meta[AUTOCAST] = stack[-1]
        for body in inner.get(id(node), ()):
            region = isinstance(node.target, HigherOrderOperator) and node.target.name() == "wrap_with_autocast"
            mark_autocast(body.gm, _changed(stack[-1], *node.args[:3]) if region else stack[-1])


def _changed(around: Mapping[str, torch.dtype], device: Any, dtype: Any, enabled: Any) -> Mapping[str, torch.dtype]:
    """What holds inside a region: its own device's precision is new, that of others stays."""
    others = {d: t for d, t in around.items() if d != device}
    return {**others, device: dtype or torch.get_autocast_dtype(device)} if enabled else others


class Replay(fx.Interpreter):
    """Runs a graph with its autocast regions in force. `_enter_autocast` alone does nothing while a graph is traced."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's outputs; regions that an error leaves open are closed."""
        self.open: list[torch.autocast] = []
        try:
            return super().run(*args, **kwargs)
        finally:
            while self.open:
                self.open.pop().__exit__(None, None, None)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One node; entering and leaving a region are done by the context manager itself."""
        if target is _enter_autocast:
            device, dtype, enabled, cache = args
            self.open.append(torch.autocast(device, dtype, enabled, cache))
            self.open[-1].__enter__()
            return self.open[-1]
        if target is _exit_autocast:
            return self.open.pop().__exit__(None, None, None)
        if target is _data or (target is getattr and args[1] == "data"):
            # `x.data` would not be traced, and what is written to it would be lost.
            return torch.ops.aten.detach.default(args[0])
        if target is torch.ops.higher_order.autograd_function_apply:
            return _kept(target, args, kwargs)
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            # The tracer asks for it, whether or not the user gave one; this is what the operator itself defaults to.
            args[0].meta.setdefault("_checkpoint_context_fn", _RECOMPUTE)
            with _quiet("torch._higher_order_ops.wrap"):
                return super().call_function(target, args, kwargs)
        return super().call_function(target, args, kwargs)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of one logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_data = getattr(torch._C._autograd, "_get_data_attr", None)
_RECOMPUTE = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


def _kept(target: Any, args: Any, kwargs: Any) -> Any:
    """A call traced as one node with its bodies as they are: traced through, a function would lose its own gradient."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return target(*args, **kwargs)
    tracer: Any = mode.tracer
    with proxy_tensor.disable_proxy_modes_tracing():
        example = target(*args, **kwargs)

    def proxied(x: Any) -> Any:
        if isinstance(x, fx.GraphModule):
            name = tracer.get_fresh_qualname("function_body")
            tracer.root.register_module(name, x)
        return tracer.unwrap_proxy(x)

    call = tracer.create_proxy("call_function", target, tuple(map(proxied, args)), kwargs)
    return proxy_tensor.track_tensor_tree(example, call, constant=None, tracer=tracer)
