"""In-place changes made pure, one storage at a time.

A storage is a tensor that the graph makes and everything that aliases it. Where every write to it can be expressed
as a new version of the whole, the writes become pure operators and later reads see the newest version. Where one
cannot, all of that storage's writes stay as they are and its nodes carry them in `meta["attnopt_writes"]`, so that
a reader can refuse to move across them. Inputs, parameters and buffers are always of the second kind: their changes
are effects that the caller sees.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.aliasing import PARTS, aliased, fake_value, itself, pure_target, run_fake, written

aten = torch.ops.aten
WRITES = "attnopt_writes"

# Aliases whose change can be carried to the tensor that they view. Splits and unbinds are known by their items.
_SAME = {
    aten.alias.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other,
    aten.type_as.default,
}  # fmt: skip
_RESHAPES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten._unsafe_view.default,
    aten.reshape_as.default,
}  # fmt: skip
_SWAPS = {
    aten.transpose.int, aten.t.default, aten.mT.default, aten.swapaxes.default, aten.permute.default, aten.movedim.int,
}  # fmt: skip
# Aliases that read memory and not elements: another version of their storage may lie differently in memory.
_BY_STRIDE = {aten.as_strided.default, aten.view.dtype, aten.real.default, aten.imag.default, aten.view_as_real.default}
# Operators that change what a tensor object looks like, and the view that it looks like afterwards.
_RESHAPED = {
    aten.unsqueeze_.default: aten.unsqueeze.default, aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim, aten.squeeze_.dims: aten.squeeze.dims,
    aten.transpose_.default: aten.transpose.int, aten.t_.default: aten.t.default,
    aten.swapaxes_.default: aten.swapaxes.default, aten.detach_.default: aten.detach.default,
}  # fmt: skip


def functionalize(graph: fx.Graph) -> None:
    """Replace the writes to the graph's own storages by pure operators, in place."""
    if any(written(n) for n in graph.nodes):
        _restate(graph)
        _Functionalizer(graph).run()


def _restate(graph: fx.Graph) -> None:
    """`y.unsqueeze_(0)` changes the tensor object: from there on, its name means the view."""
    for node in list(graph.nodes):
        if node.target in _RESHAPED:
            node.target = _RESHAPED[node.target]
            _replace_after(node.args[0], node)  # type: ignore[arg-type]


def _replace_after(old: fx.Node, new: fx.Node) -> None:
    """Every use of `old` after the node `new` becomes a use of `new`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: new < user)


class _Functionalizer:
    """Follows every storage through the graph. A version is the number of writes that a value has seen."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.root: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        self.kept: set[fx.Node] = set()
        self.version: dict[fx.Node, int] = {}
        self.count: dict[fx.Node, int] = {}
        self.newest: dict[tuple[fx.Node, int], fx.Node] = {}
        self.parent: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        self._find_storages()
        for node in list(self.graph.nodes):
            root = self.root.get(node, node)
            targets = written(node)
            for used in node.all_input_nodes:
                if used not in targets:
                    self._renew(node, used)
            if targets and self.root[targets[0]] not in self.kept:
                self._purify(node, targets[0])
            else:
                self.version[node] = self.count.get(root, 0)
        self._chain_kept_writes()

    def _chain_kept_writes(self) -> None:
        """A write that stays gives its target back; later readers take it from there, which shows their order."""
        for node in (w for root in self.kept for w in self.writes.get(root, ())):
            targets = written(node)
            if len(targets) == 1 and isinstance(fake_value(node), torch.Tensor):
                _replace_after(targets[0], node)

    def _find_storages(self) -> None:
        for node in self.graph.nodes:
            targets = written(node)
            for target in targets:
                root = self.root.get(target, target)
                self.writes.setdefault(root, []).append(node)
                if root.op in ("placeholder", "get_attr") or len(targets) > 1 or not self._expressible(node, target):
                    self.kept.add(root)
            source = targets[0] if targets else aliased(node)
            self.root[node] = node if source is None else self.root.get(source, source)
            if source is not None and not targets:
                self.parent[node] = itself(source)
            if node.target in _BY_STRIDE:
                self.kept.add(self.root[node])
        for node, root in self.root.items():
            if root in self.kept and root in self.writes:
                node.meta[WRITES] = tuple(self.writes[root])

    def _expressible(self, node: fx.Node, target: fx.Node) -> bool:
        """Whether the write has a pure form and its target is reached from the storage by known views."""
        if node.args[:1] != (target,) or pure_target(node.target) is None:
            return False
        target = itself(target)
        while target in self.parent:
            if _undo(target) is None:
                return False
            target = self._source(target)
        seen = fake_value(target)
        # Values traced under vmap cannot be computed with any more.
        return isinstance(seen, torch.Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(seen)

    def _renew(self, node: fx.Node, used: fx.Node) -> None:
        with self.graph.inserting_before(node):
            latest = self._latest(used)
        if latest is not used:
            node.replace_input_with(used, latest)

    def _latest(self, node: fx.Node) -> fx.Node:
        """The node's value after every write so far: itself, the newest version, or a view taken again."""
        root = self.root.get(node, node)
        if root in self.kept:
            return node
        count = self.count.get(root, 0)
        if self.version.get(node, 0) == count:
            return node
        if (node, count) not in self.newest:
            source = self._latest(self.parent[node])
            copy = self.graph.node_copy(node, lambda n: source if n is node.args[0] else n)
            copy.target = aten.reshape.default if copy.target is aten.view.default else copy.target
            self.newest[node, count] = copy
        return self.newest[node, count]

    def _purify(self, node: fx.Node, target: fx.Node) -> None:
        root = self.root[target]
        chain = [target]
        while chain[-1] is not root:
            chain.append(self._source(chain[-1]))
        with self.graph.inserting_before(node):
            before = {x: self._latest(x) for x in chain}
            new = self._computed(node, target, before[target])
            count = self.count[root] = self.count.get(root, 0) + 1
            for inner, outer in zip(chain, [*chain[1:], None], strict=True):
                self.newest[inner, count] = new
                undo = _undo(inner)
                if outer is not None and undo is not None:
                    new = undo(self, inner, new, before[outer])
        node.replace_all_uses_with(target)
        self.graph.erase_node(node)

    def _source(self, node: fx.Node) -> fx.Node:
        """The tensor that a view was taken of; for an item of a split, what was split."""
        source = self.parent[node]
        return self.parent[source] if node.target is operator.getitem else source

    def _computed(self, node: fx.Node, target: fx.Node, before: fx.Node) -> fx.Node:
        """What the write leaves in its target: of the target's shape and dtype, whatever the pure operator gives."""
        seen, pure = fake_value(before), pure_target(node.target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: before if n is target else n)
        if node.target is aten.copy_.default:
            new = self._call(aten.clone.default, args[1:2], {}, node)
        else:
            new = self._call(pure, args, kwargs, node)
        if fake_value(new).dtype != seen.dtype or fake_value(new).device != seen.device:
            new = self._call(aten.to.device, (new, seen.device, seen.dtype), {}, node)
        if fake_value(new).shape != seen.shape:
            new = self._call(aten.expand.default, (new, self._sizes(before)), {}, node)
        return new

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in like.meta.items() if k not in ("val", WRITES)}
        with torch.no_grad():
            made.meta["val"] = run_fake(made)
        return made

    def _sizes(self, node: fx.Node) -> list[Any]:
        sizes: list[Any] = []
        for place, size in enumerate(fake_value(node).shape):
            sizes.append(size if isinstance(size, int) else self._call(aten.sym_size.int, (node, place), {}, node))
        return sizes

    # What a changed view makes of the tensor that it views.

    def part(self, view: fx.Node, new: fx.Node, source: fx.Node) -> fx.Node:
        """Slices, selections and items of a split: put back where they were taken."""
        if view.target in (aten.slice.Tensor, aten.select.int):
            scatter = aten.slice_scatter.default if view.target is aten.slice.Tensor else aten.select_scatter.default
            return self._call(scatter, (source, new, *view.args[1:]), dict(view.kwargs), view)
        if view.target is aten.narrow.default:
            _, dim, start, length = view.args
            place = (dim, start, start + length)  # type: ignore[operator]
            return self._call(aten.slice_scatter.default, (source, new, *place), {}, view)
        parts, item = self.parent[view], int(view.args[1])  # type: ignore[arg-type]
        dim = parts.kwargs.get("dim", 0)
        named = [a.name for a in parts.target._schema.arguments]  # type: ignore[union-attr]
        dim = parts.args[named.index("dim")] if len(parts.args) > named.index("dim") else dim
        if parts.target is aten.unbind.int:
            return self._call(aten.select_scatter.default, (source, new, dim, item), {}, view)
        sizes = [int(part.shape[dim]) for part in fake_value(parts)]
        start = sum(sizes[:item])
        return self._call(aten.slice_scatter.default, (source, new, dim, start, start + sizes[item]), {}, view)

    def swap(self, view: fx.Node, new: fx.Node, source: fx.Node) -> fx.Node:
        """Permuted dimensions: permuted back."""
        rank = fake_value(source).dim()
        if view.target is aten.permute.default:
            order = [d % rank for d in view.args[1]]  # type: ignore[union-attr]
            return self._call(aten.permute.default, (new, [order.index(d) for d in range(rank)]), {}, view)
        if view.target is aten.movedim.int:
            return self._call(aten.movedim.int, (new, view.args[2], view.args[1]), {}, view)
        return self._call(view.target, (new, *view.args[1:]), dict(view.kwargs), view)

    def reshape(self, view: fx.Node, new: fx.Node, source: fx.Node) -> fx.Node:
        """Regrouped dimensions: regrouped back."""
        return self._call(aten.reshape.default, (new, self._sizes(source)), {}, view)

    def same(self, view: fx.Node, new: fx.Node, source: fx.Node) -> fx.Node:
        """Another name for the whole."""
        return new


_Undo = Callable[[_Functionalizer, fx.Node, fx.Node, fx.Node], fx.Node]


def _undo(view: fx.Node) -> _Undo | None:
    if view.target in (aten.slice.Tensor, aten.select.int, aten.narrow.default):
        plain = view.target is not aten.narrow.default or all(isinstance(x, int) for x in view.args[1:])
        return _Functionalizer.part if plain else None
    if view.target is operator.getitem:
        parts = isinstance(view.args[0], fx.Node) and view.args[0].target in PARTS
        fixed = parts and all(isinstance(n, int) for x in fake_value(view.args[0]) for n in x.shape)
        return _Functionalizer.part if fixed else None
    for views, undo in ((_RESHAPES, "reshape"), (_SWAPS, "swap"), (_SAME, "same")):
        if view.target in views:
            return getattr(_Functionalizer, undo)  # type: ignore[no-any-return]
    return None
