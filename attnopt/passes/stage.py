"""`Stage`: a graph under an approximate rewrite, with its sites, its tensors and the calibration inputs.

A rewrite changes a stage in three ways: it makes parameters smaller (`cut`), it takes in tensors of its own (`add`),
and it gives a site another spec (`put`). What results is found, lowered and validated like any other graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from attnopt import patterns
from attnopt.errors import Decline
from attnopt.graph import ADDED, WEIGHT, added_name, drop_dead_code, is_call, module_path, value
from attnopt.passes.lower import Lowering
from attnopt.passes.sites import Sites as Sites
from attnopt.passes.sites import chosen_sites, site_key
from attnopt.passes.tolerance import Calibration
from attnopt.patterns import called
from attnopt.region import Region
from attnopt.spec import AttentionSpec

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """A call of a site, without dropout: q `[B, Hq, n_q, d_qk]`, k and v likewise, and what its spec loads."""

    spec: AttentionSpec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    captures: Sequence[torch.Tensor]
    scalars: Sequence[int]


class Stage:
    """A graph under rewriting: its sites by key, and the tensors it takes.

    A site's key is its module path, with `#1`, `#2`... for further sites of the same module.

    Attributes:
        gm: the graph; rewrites change it in place.
        tensors: state name to tensor; rewrites replace entries. Empty where the graph alone is rewritten again.
        calibration: the inputs to measure on, and the names of the states that the graph takes.
        regions: site key to region. declined: site key to the reason. paths: all keys in graph order.
        added: tensors that rewrites brought along when the model was rewritten before.
        cuts: parameters that became smaller so far.
    """

    def __init__(
        self, gm: fx.GraphModule, calibration: Calibration, tensors: Tensors, constants: Tensors,
        added: Tensors | None = None,
    ) -> None:  # fmt: skip
        self.gm = gm
        self.calibration = calibration
        self.tensors = dict(tensors)
        self.added = dict(added or {})
        self.constants = constants
        self.cuts: list[tuple[str, int, tuple[int, ...], tuple[int, ...]]] = []
        self.regions: dict[str, Region] = {}
        self.declined: dict[str, str] = {}
        self.paths: list[str] = []
        self._lowering: Lowering | None = None
        for anchor, _, result in patterns.find(gm.graph, constants):
            path = module_path(anchor)
            count = sum(p == path or p.startswith(f"{path}#") for p in self.paths)
            key = f"{path}#{count}" if count else path
            self.paths.append(key)
            if isinstance(result, Region):
                self.regions[key] = result
            else:
                self.declined[key] = str(result)

    @property
    def states(self) -> dict[fx.Node, str]:
        """The placeholder of each parameter and buffer, and its name."""
        inputs = (n for n in self.gm.graph.nodes if n.op == "placeholder")
        return dict(zip(inputs, self.calibration.states, strict=False))

    def key(self, given: str | int, rewrite: str) -> str:
        """The key of a site that the user named. Raises `OptionError` with what there is."""
        return site_key(self.paths, given, rewrite)

    def choose(self, sites: Sites, rewrite: str) -> list[str]:
        """The keys of the sites that the user means, in graph order; None means all. Raises as `chosen_sites`."""
        return chosen_sites(self.paths, {key: region.spec for key, region in self.regions.items()}, sites, rewrite)

    # --- parameters ------------------------------------------------------------------------------

    def cut(self, placeholder: fx.Node, dim: int, keep: tuple[int, ...]) -> None:
        """Keep only part of the parameter that a placeholder takes."""
        name = self.states[placeholder]
        old = self.tensors.get(name)
        self.cuts.append((name, dim, keep, tuple(old.shape) if old is not None else ()))
        if old is None or old.shape[dim] == len(keep):
            return
        index = torch.tensor(keep, dtype=torch.int64, device=old.device)
        self.tensors[name] = torch.nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad)

    def shared(self, placeholders: Iterable[fx.Node]) -> str | None:
        """The name of a parameter among these that is held under another name too, or is no parameter."""
        for node in placeholders if set(self.tensors) - set(self.added) else ():
            name = self.states.get(node)
            held = self.tensors.get(name or "")
            names = [n for n, tensor in self.tensors.items() if tensor is held]
            if name is None or not isinstance(held, torch.nn.Parameter) or len(names) > 1:
                return name or str(node)
        return None

    def add(self, key: str, name: str, make: Callable[[], torch.Tensor]) -> fx.Node:
        """A placeholder for a tensor that the rewrite brings along: a `nn.Parameter`, or a buffer otherwise.

        It belongs to the site `key` and lives in the optimised model as `attnopt.<site>.<name>`. `make` is called
        the first time only; another capture of the model takes the tensor that is there, trained or not.
        """
        state = f"{added_name(key, self.paths)}.{name}"
        if state not in self.tensors:
            self.tensors[state] = self.added[state] if state in self.added else make()
        node = next((node for node, held in self.states.items() if held == state), None)
        if node is None:
            node = self._placeholder(state)
        held, fakes = self.tensors[state], self._fakes()
        node.meta["val"] = fakes.from_tensor(held.detach()) if fakes is not None else held.detach()
        return node

    def _placeholder(self, state: str) -> fx.Node:
        """A new placeholder behind those of the other states."""
        states = self.calibration.states
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        before = placeholders[len(states)] if len(placeholders) > len(states) else self._first()
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.placeholder(state.replace(".", "_"))
        node.meta[WEIGHT] = True
        self.calibration = replace(self.calibration, states=(*states, state))
        return node

    def _first(self) -> fx.Node:
        return next(n for n in self.gm.graph.nodes if n.op != "placeholder")

    def _fakes(self) -> Any:
        return detect_fake_mode([value(n) for n in self.gm.graph.nodes if n.op == "placeholder"])

    # --- sites -----------------------------------------------------------------------------------

    def emit(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in front of a node, with its fake value."""
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.call_function(target, args, kwargs)
        _fill(node, self._fakes())
        return node

    def put(self, key: str, region: Region, rewrite: str = "") -> Decline | None:
        """Let a site compute `region`, a changed copy of its own, from now on. A decline leaves the graph as it was.

        The operands may be nodes of the graph other than before; the output and its dimensions stay the source's.
        With the site's own region it becomes a call of the operator, its operands `[B, H, n, d]`; without the name
        of a rewrite the report says nothing of it.
        """
        old = self.regions[key]
        earlier = old.anchor.meta.get("attnopt_rewrites", ())
        # One for all sites: an operand may be what another site gave before.
        self._lowering = lowering = self._lowering or Lowering(self.gm)
        before = set(self.gm.graph.nodes)
        call = lowering.lower(region)
        if isinstance(call, Decline):
            return call
        fakes = self._fakes()
        for node in (n for n in self.gm.graph.nodes if n not in before):
            if value(node) is None:
                _fill(node, fakes)
            if is_call(node, torch.ops.attnopt.attention.default):
                node.meta["attnopt_rewrites"] = (*earlier, rewrite) if rewrite else earlier
                del node.meta["attnopt_call"]
        lowering.replaced[region.output].meta.pop("attnopt_site", None)
        found = called.match(call, self.constants)
        if isinstance(found, Region):
            self.regions[key] = found
        return None

    def plain(self, key: str) -> Region | Decline:
        """A site as one call of the operator on `[B, heads, n, width]`, whatever the source's layout was.

        A rewrite can append to its operands, or work on its output, without knowing that layout. `region.output` is
        the call's result; it has users of its own, which put it into the source's layout.
        """
        region = self.regions[key]
        found = None if region.pattern == "attnopt" else self.put(key, region, "")
        return self.regions[key] if found is None else found

    def empty(self, nodes: Iterable[fx.Node], names: Iterable[str] | None = None) -> None:
        """Make the parameters that were read for these nodes alone empty: nothing reads them any more.

        Call after the last `put`. `names`: those that were made empty when the model was rewritten before.
        """
        before = _sources(nodes)
        drop_dead_code(self.gm.graph)
        for node, name in self.states.items():
            if node not in before or node.users or name.startswith(f"{ADDED}."):
                continue
            held = self.tensors.get(name)
            if held is None:
                wanted = name in (names or ())
            else:
                wanted = isinstance(held, torch.nn.Parameter) and held.dim() > 0 and not self.shared([node])
            if wanted:
                self.cut(node, 0, ())
                node.meta["val"] = value(node)[:0]

    def finish(self) -> None:
        """Drop what nothing uses any more. Call once after the last change."""
        if self._lowering is not None:
            self._lowering.finish()
            self._lowering = None
        drop_dead_code(self.gm.graph)
        self.gm.graph.lint()
        self.gm.recompile()

    def visit(self, see: Callable[[str, Seen], None]) -> None:
        """Run the graph on every calibration input; `see(key, seen)` is called at each recognised site in order."""
        again = Stage(copied(self.gm), self.calibration, self.tensors, self.constants)
        keys = {}
        for key, region in again.regions.items():
            if not region.merge and again.put(key, region, "visit") is None:
                keys[again.regions[key].anchor.name] = key
        again.finish()
        with torch.no_grad():
            for _ in self.calibration.run(_Visitor(again.gm, keys, see), self.tensors):
                pass


class _Visitor(fx.Interpreter):
    """Runs a graph and shows what every call of the operator is given."""

    def __init__(self, gm: fx.GraphModule, keys: Mapping[str, str], see: Callable[[str, Seen], None]) -> None:
        super().__init__(gm)
        self.keys, self.see = keys, see

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.keys:
            (q, k, v, captures, scalars, text), _ = self.fetch_args_kwargs_from_env(n)
            spec = replace(AttentionSpec.parse(text), dropout=0.0)
            self.see(self.keys[n.name], Seen(spec, q, k, v, captures[: len(spec.captures)], scalars))  # less a seed
        return super().run_node(n)


def _fill(node: fx.Node, fakes: Any) -> None:
    """Give a new call its fake value, from those of its arguments."""
    if node.op != "call_function" or not callable(node.target):
        return
    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    if fakes is None:
        node.meta["val"] = node.target(*args, **kwargs)
        return
    with fakes:
        node.meta["val"] = node.target(*args, **kwargs)


def _sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they are computed from."""
    queue, seen = list(nodes), set(nodes)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                queue.append(node)
    return seen


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same attributes."""
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, fresh)
