"""Helpers on `fx` graphs, and the passes that bring a captured graph to its normal form.

Normal form: pre-dispatch aten operators by their first names, no nested no-grad regions, no in-place change of a tensor
that the graph itself made, as far as it can be expressed (see `functional`). The bodies of higher-order operators
have it too.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from attnopt import dump
from attnopt.functional import functionalize
from attnopt.nested import bodies, mark_autocast, name_apart
from attnopt.synonyms import rename

aten = torch.ops.aten
# Marks an input that is a parameter or a buffer, where its name does not say so.
WEIGHT = "attnopt_weight"
# Where torch's modules lie: the line that calls one tells more than the line inside.
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
# The submodule of an optimised model that holds what approximate rewrites bring along, such as learned maps.
ADDED = "attnopt"

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


def op_name(node: Any) -> str:
    """`aten::add` for a call of an aten operator, else an empty string."""
    target = node.target if isinstance(node, fx.Node) else None
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    name = target._schema.name
    return f"{name}.{target._schema.overload_name}" if name in ("aten::min", "aten::max") else name


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
    """`file:line` of the innermost user code that made the node; torch's own where there is no other."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    if not lines:
        return None
    places = [(line.split('"')[1], line.split("line ")[1].split(",")[0]) for line in lines]
    path, number = ([p for p in places if not p[0].startswith(_TORCH)] or places)[-1]
    return f"{path}:{number}"


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made the node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [v[0] for v in stack.values()]
    path = str(entries[-1]) if entries else ""
    # Dynamo's name of the module itself, whatever its forward calls it.
    return re.sub(r"^L\['\w+'\]\.?", "", path.replace("L__self___", ""))


def added_name(key: str, keys: Iterable[str]) -> str:
    """Where the tensors live that rewrites bring along for a site: `a.b` and `a_b` have two places."""
    name = _joined(key)
    alike = [other for other in keys if _joined(other) == name]
    place = alike.index(key) if key in alike else 0
    return ".".join((ADDED, f"{name}__{place}" if place else name))


def _joined(key: str) -> str:
    return key.replace(".", "_").replace("#", "_") or "root"


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Bring the graph to normal form, in place."""
    dump.graph("captured", gm)
    _normalize(gm)
    mark_autocast(gm)
    dump.graph("functional", gm)
    return gm


def _normalize(gm: fx.GraphModule) -> None:
    """One graph, then the bodies of its higher-order operators."""
    _mend_users(gm.graph)
    for node in list(gm.graph.nodes):
        if is_call(node, torch.ops.higher_order.wrap_with_set_grad_enabled):
            _inline_grad_region(gm, node)
    for node in list(gm.graph.nodes):
        if is_call(node, *_DROPPED) and not node.users:
            gm.graph.erase_node(node)
    _detach_ungraded(gm.graph)
    # The trace of a function under vmap leaves dead calls behind, whose fake values cannot be computed with.
    drop_dead_code(gm.graph)
    rename(gm.graph)
    for node in gm.graph.nodes:
        if is_call(node, aten.cat.default):
            _drop_nothing(node)
    functionalize(gm.graph)
    drop_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for body in bodies(gm):
        if not body.closed:
            _normalize(body.gm)
            name_apart(body)
            body.gm.recompile()


def _drop_nothing(cat: fx.Node) -> None:
    """Beside parts of more dimensions `cat` takes empty ones of one, such as an empty cache has: leave them out."""
    parts = cat.args[0]
    kept = [x for x in parts if len(value(x).shape) != 1 or value(x).shape[0] != 0]  # type: ignore[union-attr]
    if kept and len(kept) < len(parts) and len(value(kept[0]).shape) > 1:  # type: ignore[arg-type]
        cat.args = (kept, *cat.args[1:])


def _mend_users(graph: fx.Graph) -> None:
    """Every node is a user of what it takes, and of nothing else: `torch.export` loses some users around autocast."""
    for node in graph.nodes:
        for taken in node.all_input_nodes:
            taken.users.setdefault(node)
        for stale in [user for user in node.users if node not in user.all_input_nodes]:
            del node.users[stale]


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


def _detach_ungraded(graph: fx.Graph) -> None:
    """Detach what is computed between `_set_grad_enabled(False)` and `(True)` for who reads it outside.

    That is what the two mean for gradients, and a region that is read as one then does not span them.
    """
    enabled, graded = True, dict[fx.Node, bool]()
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        kept = node.args[0] if node.target is operator.getitem else None
        graded[node] = graded[kept] if isinstance(kept, fx.Node) else enabled
    for node in [n for n, on in graded.items() if not on and n.op == "call_function" and not _writes(n)]:
        outside = [user for user in node.users if graded[user] or user.op == "output"]
        if outside and isinstance(value(node), torch.Tensor):
            with graph.inserting_after(node):
                copy = _detached(graph, node)
            for user in outside if copy is not node else ():
                user.replace_input_with(node, copy)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(value(node), torch.Tensor) or not value(node).is_floating_point():
        return node
    copy = graph.call_function(aten.detach.default, (node,))
    copy.meta = dict(node.meta)
    return copy


def drop_dead_code(graph: fx.Graph) -> None:
    """Drop nodes that nothing uses; what writes, draws random numbers or is unknown stays."""
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """Whether dropping an unused node changes nothing: it writes nothing and draws no random number."""
    if node.op == "get_attr" or (node.op == "call_function" and node.target is operator.getitem):
        return True
    if is_call(node, torch.ops.higher_order.flex_attention):
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.is_mutable:
        return False
    a = arguments(node)
    # Dropout that is off counts as random for torch, which would keep the whole attention before it alive.
    off = node.target is aten.dropout.default and not (a["train"] and a["p"] > 0)
    off = off or (node.target is aten.scaled_dot_product_attention.default and a.get("dropout_p", 0.0) == 0)
    return off or torch.Tag.nondeterministic_seeded not in node.target.tags
