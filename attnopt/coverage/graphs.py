"""Capturing a model and lowering its sites, by torch.export or, where that refuses, on the graphs that Dynamo makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt import pipeline
from attnopt.capture import capture, share
from attnopt.coverage.witness import normalizers, witness
from attnopt.dynamo import retrace
from attnopt.errors import CaptureError
from attnopt.fidelity import strayed
from attnopt.graph import module_path, source_line, value
from attnopt.module import Compiled
from attnopt.options import Options
from attnopt.region import Region
from attnopt.report import Site
from attnopt.runtime import dispatch

_LEFT = {"status": "declined", "form": "", "mask": "", "spec": "", "lengths": None}


@dataclass(frozen=True)
class Pair:
    """One graph before and after lowering, with inputs."""

    original: fx.GraphModule
    lowered: fx.GraphModule
    inputs: Sequence[Any]
    options: Options

    def in_double(self) -> tuple[list[Any], list[Any]]:
        """The outputs of both in fp64, where only a wrong rewrite makes a difference."""
        outputs = []
        for gm in (self.original, self.lowered):
            torch.manual_seed(0)  # a model may draw noise
            with torch.no_grad(), dispatch.use(self.options):
                outputs.append(list(Double(gm).run(*_copies(self.inputs))))
        return outputs[0], outputs[1]


def _copies(inputs: Sequence[Any]) -> list[Any]:
    """The inputs in fp64, none of them shared, since a graph may write to its inputs."""
    return [double(x).clone() if isinstance(x, torch.Tensor) else x for x in inputs]


@dataclass
class Treated:
    """A model after its treatment: sites, what the witness saw, and ways to run it on the inputs it was made for.

    `unknown` has a row for each graph that could not be traced further and runs as it is: no site of it can be seen.
    """

    way: str
    run: Callable[[], Any]
    sites: list[dict[str, Any]] = field(default_factory=list)
    missed: list[dict[str, str]] = field(default_factory=list)
    others: int = 0
    nodes: int = 0
    unknown: list[dict[str, Any]] = field(default_factory=list)
    graphs: list[Pair] = field(default_factory=list)

    def look(self, gm: fx.GraphModule, inputs: Sequence[Any], options: Options, constants: Any) -> None:
        """Count, find and lower the sites of one graph, in place."""
        seen, prefix = witness(gm.graph), f"{len(self.graphs)}." if self.graphs else ""
        nodes = {n.name: n for n in gm.graph.nodes}
        original = copy_of(gm)
        found = pipeline.find(gm.graph, constants, options)
        lengths = {f.anchor: _lengths(f.result) for f in found if isinstance(f.result, Region)}
        claimed = {n.name for f in found for n in (f.anchor, *_explained(f.result))}
        missed = [nodes[name] for name in seen.sites if name not in claimed]
        self.missed.extend(
            {"name": prefix + n.name, "module": module_path(n), "source": short(source_line(n) or "")} for n in missed
        )
        for item in pipeline.lower(gm, found):
            self.sites.append({**_plain(item.site()), "lengths": lengths.get(item.anchor)})
        self.graphs.append(Pair(original, gm, inputs, options))
        self.nodes += len(nodes)
        self.others += len(seen.others)


def _lengths(region: Region) -> tuple[int, int] | None:
    """How many queries and keys there are, where both are numbers."""
    found = []
    for operand, name in ((region.query, "q"), (region.key, "k")):
        dims = [i for i, dim in enumerate(operand.dims) if dim == name]
        size = value(operand.node).shape[dims[0]] if len(dims) == 1 else None
        found.append(size if isinstance(size, int) else None)
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def _explained(result: Any) -> set[fx.Node]:
    """Other anchors that a region covers: further terms of a sum, feature maps, a guard's second softmax."""
    if not isinstance(result, Region):
        return set()
    return {*result.claims, *(n for term in result.terms for n in term.inner)}


def _plain(site: Site) -> dict[str, Any]:
    """A site as plain data."""
    return {
        "name": site.name, "module": site.module_path, "source": short(site.source), "pattern": site.pattern,
        "status": site.status, "reason": site.reason, "form": site.form, "mask": site.mask,
        "spec": "" if site.spec is None else str(site.spec),
    }  # fmt: skip


def short(source: str) -> str:
    """A source line from its package on: `transformers/models/llama/modeling_llama.py:200`."""
    return source.split("site-packages/")[-1]


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The module with a graph of its own; submodules and tensors are shared."""
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, fresh)


def treat(model: nn.Module, inputs: dict[str, Any], options: Options) -> Treated:
    """Capture the model and lower its sites. Raises `CaptureError` if neither way makes a graph."""
    try:
        captured = capture(share(model), (), inputs)
    except CaptureError as error:
        return _by_dynamo(model, inputs, options, str(error))
    compiled = Compiled(captured, captured.gm, model, options)
    given = [held[name] for held, name in compiled.slots] + captured.flatten((), inputs)
    treated = Treated("export", lambda: compiled((), inputs))
    why = strayed(model, captured, given[: len(compiled.slots)], (), inputs)
    with dispatch.use(options):
        treated.look(captured.gm, given, options, captured.scalars)
    if why:
        treated.run = lambda: model(**inputs)
        treated.sites = [{**site, **_LEFT, "reason": f"{why}, so it runs as it is"} for site in treated.sites]
    return treated


class Double(fx.Interpreter):
    """Runs a graph in fp64, whatever precision its casts ask for."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The call with floating-point tensors and dtypes in fp64."""
        args, kwargs = pytree.tree_map(double, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The attribute in fp64."""
        return double(super().get_attr(target, args, kwargs))


def double(value: Any) -> Any:
    """A floating-point tensor or dtype in fp64; anything else as it is. 16-bit casts stay, since they are meant."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def _by_dynamo(model: nn.Module, inputs: dict[str, Any], options: Options, why: str) -> Treated:
    treated = Treated(f"dynamo: {why}", lambda: None)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            traced = retrace(gm, example_inputs)
        except CaptureError as error:
            treated.unknown.append(
                {"why": " ".join(str(error).split())[:300], "normalizers": len(normalizers(gm.graph))}
            )
            return gm.forward
        treated.look(traced, list(example_inputs), options, {})

        def run(*given: Any) -> Any:
            with dispatch.use(options):
                return traced(*given)

        return run

    torch._dynamo.reset()
    function = torch.compile(share(model), backend=backend, dynamic=False)
    try:
        with torch.no_grad():
            function(**inputs)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CaptureError(f"{why} Dynamo: {type(error).__name__}: {lines[0] if lines else ''}") from error
    treated.run = lambda: function(**inputs)
    return treated
