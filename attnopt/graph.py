"""Helpers on `fx` graphs, and the passes that bring a captured graph to its normal form.

Normal form: pre-dispatch aten operators, no nested no-grad regions, no in-place change of a tensor that
the graph itself made. In-place changes of inputs and buffers stay: they are effects that the caller sees.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# View operators whose write-back is a scatter or an inverse view; the others taint their base.
_SCATTER: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_VIEWS = {
    aten.slice.Tensor, aten.select.int, aten.view.default, aten.reshape.default, aten.transpose.int,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default,
    aten.alias.default, aten.detach.default, aten.t.default, aten.mT.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.narrow.default, aten.diagonal.default, aten.contiguous.default, aten.to.dtype,
    aten.to.device, aten.to.dtype_layout, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, aten.view_as.default, aten.expand_as.default, aten.squeeze.dims, aten.movedim.int,
}  # fmt: skip
_DROPPED = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
}


def value(node: Any) -> Any:
    """The fake value of a node: a tensor with shape, dtype and device, a symbolic int, or None."""
    meta = getattr(node, "meta", None)
    return node if meta is None else meta.get("val", meta.get("example_value"))


def is_call(node: Any, *targets: Any) -> bool:
    """Whether the node calls one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten call by schema name, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return dict(node.kwargs)
    found = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    found.update(zip((a.name for a in target._schema.arguments), node.args, strict=False))
    found.update(node.kwargs)
    return found


def source_line(node: fx.Node) -> str | None:
    """`file:line` of the innermost user code that made the node."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    if not lines:
        return None
    path, number = lines[-1].split('"')[1], lines[-1].split("line ")[1].split(",")[0]
    return f"{path}:{number}"


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made the node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [v[0] for v in stack.values()]
    path = str(entries[-1]) if entries else ""
    return path.replace("L['self'].", "").replace("L__self___", "").removeprefix("L['self']")


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Bring the graph to normal form, in place."""
    for node in list(gm.graph.nodes):
        if is_call(node, torch.ops.higher_order.wrap_with_set_grad_enabled):
            _inline_grad_region(gm, node)
    for node in list(gm.graph.nodes):
        if is_call(node, *_DROPPED) and not node.users:
            gm.graph.erase_node(node)
    _Functionalizer(gm.graph).run()
    drop_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def _inline_grad_region(gm: fx.GraphModule, call: fx.Node) -> None:
    """Inline a grad-mode region; results of a no-grad region are detached, which is what no-grad means."""
    enabled, submodule_node, *inputs = call.args
    body = getattr(gm, submodule_node.target)
    env: dict[fx.Node, Any] = {}
    holes = iter(inputs)
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(holes)
            elif node.op == "get_attr":
                setattr(gm, f"{submodule_node.target}_{node.target}", getattr(body, node.target))
                env[node] = gm.graph.get_attr(f"{submodule_node.target}_{node.target}")
            elif node.op == "output":
                results = [env.get(r, r) for r in node.args[0]]
            else:
                env[node] = gm.graph.node_copy(node, env.__getitem__)
        if not enabled:
            results = [_detached(gm.graph, r) for r in results]
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(value(node), torch.Tensor) or not value(node).is_floating_point():
        return node
    copy = graph.call_function(aten.detach.default, (node,))
    copy.meta = dict(node.meta)
    return copy


def mutated_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that an in-place operator writes to, or None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    for argument, given in zip(target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, fx.Node):
            return given
    return None


class _Functionalizer:
    """Rewrites in-place operators on the graph's own tensors as pure operators on new versions."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.base: dict[fx.Node, fx.Node] = {}
        self.version: dict[fx.Node, int] = {}
        self.current: dict[fx.Node, fx.Node] = {}
        self.count: dict[fx.Node, int] = {}
        self.fresh: dict[tuple[fx.Node, int], fx.Node] = {}

    def run(self) -> None:
        if not any(mutated_argument(n) for n in self.graph.nodes):
            return
        for node in list(self.graph.nodes):
            if self.count:
                self._renew_inputs(node)
            written = mutated_argument(node)
            if written is not None:
                self._purify(node, written)
            elif is_call(node, *_VIEWS) or node.target is operator.getitem:
                source = node.args[0]
                self.base[node] = self.base.get(source, source)
                self.version[node] = self.count.get(self.base[node], 0)

    def _renew_inputs(self, node: fx.Node) -> None:
        for used in node.all_input_nodes:
            latest = self._latest(used)
            if latest is not used:
                node.replace_input_with(used, latest)

    def _latest(self, node: fx.Node) -> fx.Node:
        """The node's value after every write so far: itself, the newest version, or a view taken again."""
        base = self.base.get(node, node)
        count = self.count.get(base, 0)
        if node is base:
            return self.current.get(base, base)
        if self.version.get(node, 0) == count:
            return node
        if (node, count) not in self.fresh:
            source = self._latest(node.args[0])
            copy = self.graph.node_copy(node, lambda n: source if n is node.args[0] else self._latest(n))
            self.base[copy], self.version[copy] = base, count
            self.fresh[node, count] = copy
        return self.fresh[node, count]

    def _purify(self, node: fx.Node, written: fx.Node) -> None:
        base = self.base.get(written, written)
        pure = _pure_target(node.target)
        root = next((k for k, v in self.current.items() if v is base), base)
        if root.op in ("placeholder", "get_attr") or pure is None or not self._writable(written, base):
            return
        with self.graph.inserting_before(node):
            new = self.graph.call_function(pure, node.args, _kept_kwargs(pure, node.kwargs))
            new.meta = dict(node.meta)
            whole = self._write_back(written, new, base)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.current[root] = self.current[base] = whole
        for name in (root, base):
            self.count[name] = self.count.get(name, 0) + 1
        if whole is not new:
            self.base[new], self.version[new] = root, self.count[root]
            self.fresh[written, self.count[root]] = new
        else:
            self.base[new] = root
            self.base.pop(new)

    def _writable(self, written: fx.Node, base: fx.Node) -> bool:
        node = written
        while node is not base:
            if not is_call(node, *_SCATTER, aten.unsqueeze.default, aten.transpose.int, aten.alias.default):
                return is_call(node, aten.view.default) and node.args[0] is base
            node = node.args[0]
        return isinstance(value(base), torch.Tensor)

    def _write_back(self, view: fx.Node, new: fx.Node, base: fx.Node) -> fx.Node:
        """The base's new version after `view`, a chain of views of it, became `new`."""
        if view is base:
            return new
        source = view.args[0]
        if view.target in _SCATTER:
            whole = self.graph.call_function(_SCATTER[view.target], (source, new, *view.args[1:]), view.kwargs)
        elif view.target is aten.unsqueeze.default:
            whole = self.graph.call_function(aten.squeeze.dim, (new, view.args[1]))
        elif view.target is aten.transpose.int:
            whole = self.graph.call_function(aten.transpose.int, (new, *view.args[1:]))
        elif view.target is aten.alias.default:
            whole = new
        else:
            whole = self.graph.call_function(aten.view.default, (new, list(value(source).shape)))
        if whole is not new:
            whole.meta = {**new.meta, "val": value(source)}
        return self._write_back(source, whole, base)


def _pure_target(target: Any) -> Any:
    """The operator without the trailing underscore, of the same overload, if there is one."""
    name, overload = target._schema.name.split("::")[1], target._schema.overload_name or "default"
    if name.startswith("__i") and name.endswith("__"):
        pure_name = f"__{name[3:-2]}__"
    elif name.endswith("_") and not name.endswith("__"):
        pure_name = name[:-1]
    else:
        return None
    packet = getattr(aten, pure_name, None)
    return getattr(packet, overload, None) if packet is not None else None


def _kept_kwargs(pure: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {a.name for a in pure._schema.arguments}
    return {k: v for k, v in kwargs.items() if k in names}


def drop_dead_code(graph: fx.Graph) -> None:
    """Drop nodes that nothing uses; what writes, draws random numbers or is unknown stays."""
    for node in reversed(list(graph.nodes)):
        if not node.users and _is_pure(node):
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr" or (node.op == "call_function" and node.target is operator.getitem):
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.is_mutable:
        return False
    a = arguments(node)
    # Dropout that is off counts as random for torch, which would keep the whole attention before it alive.
    off = node.target is aten.dropout.default and not (a["train"] and a["p"] > 0)
    return off or torch.Tag.nondeterministic_seeded not in node.target.tags
