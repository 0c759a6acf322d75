"""`torch.compile(model, backend="attnopt")`, and the way in for models that `torch.export` refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt import dump, pipeline, recompiles
from attnopt.errors import CaptureError, OptionError
from attnopt.graph import WEIGHT, normalize
from attnopt.nested import Replay, forget_default_recompute
from attnopt.options import Options
from attnopt.patterns.sizes import fixing
from attnopt.report import Report
from attnopt.runtime import dispatch

log = logging.getLogger("attnopt")
RESTS = ("inductor", "eager")
_KEPT_REPORTS = 64
# Heads and two widths may be symbolic; each is known one search after it was asked for.
_ROUNDS = 4
reports: list[Report] = []
"""One report for each graph compiled by the backend, newest last; the oldest are dropped."""


def attnopt_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend: attention is rewritten, the rest goes to Inductor.

    Args:
        gm, example_inputs: as Dynamo gives them.
        options: `{"rest": "inductor" | "eager"}` and any field of `attnopt.Options`.
        mode: not used by this backend; a mode raises `OptionError`.
    """
    if mode is not None:
        raise OptionError(f"mode={mode!r} is not known to the attnopt backend; use options={{...}}.")
    given = dict(options or {})
    rest = given.pop("rest", "inductor")
    if rest not in RESTS:
        raise OptionError(f"rest={rest!r} is unknown; choose one of {', '.join(RESTS)}.")
    recompiles.listen()
    compiled, report = compile_graph(gm, example_inputs, rest, Options.make(given))
    reports.append(report)
    del reports[:-_KEPT_REPORTS]
    return compiled


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], rest: str, options: Options
) -> tuple[Callable[..., Any], Report]:
    """A Dynamo graph with its attention rewritten, as a callable on the same inputs."""
    with dump.to(options.dump):
        traced, report = _rewritten(gm, example_inputs, options)
    run: Callable[..., Any] = traced.forward
    if rest == "inductor":
        from torch._inductor.compile_fx import compile_fx

        run = compile_fx(traced, list(example_inputs))
    else:
        pipeline.past_dispatcher(traced)

    def compiled(*inputs: Any) -> Any:
        with dispatch.use(options):
            return run(*inputs)

    return compiled, report


def _rewritten(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> tuple[fx.GraphModule, Report]:
    try:
        traced = retrace(gm, example_inputs)
    except CaptureError as error:
        # A graph that cannot be read is run as it is: a miss is never an error.
        traced, found, notes = gm, [], (f"one graph was left as it is: {error}",)
    else:
        for _ in range(_ROUNDS):
            with fixing() as fixed:
                found = pipeline.find(traced.graph, {}, options)
            if not fixed:
                break
        found = pipeline.lower(traced, pipeline.leave(found, options), again=True)
        notes = tuple(f.note for f in found if f.note)
    return traced, pipeline.announce(Report(tuple(f.site() for f in found), "torch.compile graph", notes))


def retrace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph in normal form. Raises `CaptureError` when it cannot be traced."""

    def run(*inputs: Any) -> Any:
        return Replay(gm).run(*inputs)

    try:
        with fx.traceback.preserve_node_meta():
            traced = _fake_trace(run, gm) or make_fx(run, pre_dispatch=True)(*_copies(example_inputs))
    except Exception as error:
        raise CaptureError(f"Dynamo's graph could not be traced to aten: {type(error).__name__}: {error}") from error
    forget_default_recompute(traced)
    _mark_weights(gm, traced, example_inputs)
    return normalize(traced)


def _fake_trace(run: Callable[..., Any], gm: fx.GraphModule) -> fx.GraphModule | None:
    """The trace on Dynamo's fake tensors, whose sizes may be symbolic; None where that gives no whole graph."""
    inputs = [n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.nodes if n.op == "placeholder"]
    modes = {id(x.fake_mode): x.fake_mode for x in inputs if isinstance(x, FakeTensor)}
    if len(modes) != 1 or any(x is None or (isinstance(x, torch.Tensor) and not is_fake(x)) for x in inputs):
        return None
    try:
        with next(iter(modes.values())):
            traced = make_fx(run, pre_dispatch=True)(*inputs)
    except Exception:
        log.debug("traced on copies of the inputs", exc_info=True)
        return None
    # Transforms of torch.func lose track of fake tensors, which then stand in the graph as constants.
    held = [getattr(traced, str(n.target), None) for n in traced.graph.nodes if n.op == "get_attr"]
    return None if any(isinstance(x, FakeTensor) for x in held) else traced


def _copies(example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs as the user gave them, safe from what the graph writes. Their sizes are guarded: they are for good."""
    return [x.clone() if isinstance(x, torch.Tensor) else int(x) if isinstance(x, torch.SymInt) else x
            for x in example_inputs]  # fmt: skip


def _mark_weights(gm: fx.GraphModule, traced: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Which inputs are parameters or buffers: tracing loses the names that tell."""
    named, made = ([n for n in g.graph.nodes if n.op == "placeholder"] for g in (gm, traced))
    for old, new, given in zip(named, made, example_inputs, strict=False):
        kind = str(old.target)
        if isinstance(given, nn.Parameter) or "_parameters_" in kind or "_buffers_" in kind:
            new.meta[WEIGHT] = True


class _Collecting:
    """A backend that remembers the report of every graph."""

    def __init__(self, rest: str, options: Options) -> None:
        self.rest, self.options = rest, options
        self.reports: list[Report] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled, report = compile_graph(gm, example_inputs, self.rest, self.options)
        self.reports.append(report)
        return compiled


class DynamoModule:
    """What runs an `OptimizedModule` whose model cannot be exported: the model under `torch.compile`.

    `note` is called with what Dynamo has to say later, when it compiles no more.
    """

    def __init__(
        self, source: nn.Module, rest: str, options: Options, dynamic: bool | None, note: Callable[[str], None]
    ) -> None:
        self.stale = False  # Dynamo's guards see for themselves what changed
        self.backend = _Collecting(rest, options)
        self.function = torch.compile(source, backend=self.backend, dynamic=dynamic)
        self.note = note

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with recompiles.telling(self.note):
            return self.function(*args, **kwargs)

    def loses_gradient(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Never: Dynamo keeps functions that have a gradient of their own."""
        return False


def compile_with_dynamo(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Any, why: str
) -> tuple[DynamoModule, Report]:
    """The other way: graphs as Dynamo breaks them, compiled while the model runs once on the inputs."""
    if any(getattr(r, "contract", None) is not None for r in settings.rewrites):
        packed = next((n for n, part in fast._source.named_modules() if ".quantized." in type(part).__module__), None)
        if packed is not None:
            raise CaptureError(
                f"approximate rewrites change weights and graphs, and the quantised weights of {packed} are packed: "
                "rewrite the model before it is quantised."
            )
        hint = " Pass use_cache=False: a cache of keys and values is no plain output." if "Cache'>" in why else ""
        raise CaptureError(f"approximate rewrites need a whole graph, and there is none.{hint} {why}")

    def note(text: str) -> None:
        if text not in fast.report.notes:
            fast.report = replace(fast.report, notes=(*fast.report.notes, text))

    dynamic = True if settings.dynamic_shapes else None
    compiled = DynamoModule(fast._source, settings.rest, settings.options, dynamic, note)
    try:
        with torch.no_grad():
            compiled(args, kwargs)
    except Exception as error:
        raise CaptureError(f"neither torch.export nor Dynamo could capture the model. {why} Dynamo: {error}") from error
    sites = tuple(site for report in compiled.backend.reports for site in report.sites)
    with dispatch.use(settings.options):
        sites = tuple(
            replace(s, kernel=s.kernel or dispatch.kernels(s.spec)) if s.spec is not None else s for s in sites
        )
    notes = (f"captured by Dynamo in {len(compiled.backend.reports)} graphs, because {why}",)
    notes += tuple(note for report in compiled.backend.reports for note in report.notes)
    return compiled, Report(sites, type(fast._source).__name__, notes)


def explain_with_dynamo(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, why: str
) -> Report:
    """The sites of every graph that Dynamo makes; nothing is rewritten."""
    found: list[Any] = []
    others: list[Any] = []
    missed: list[str] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            traced = retrace(gm, example_inputs)
        except CaptureError as error:
            missed.append(f"one graph was left as it is: {error}")
            return gm.forward
        sites = pipeline.find(traced.graph, {}, options)
        others.extend(pipeline.others(traced.graph, sites))
        found.extend(pipeline.lower(traced, sites, again=True))
        return gm.forward

    try:
        with torch.no_grad():
            torch.compile(source, backend=look)(*args, **kwargs)
    except Exception as error:
        raise CaptureError(f"neither torch.export nor Dynamo could capture the model. {why} Dynamo: {error}") from error
    notes = (f"captured by Dynamo, because {why}", *missed, *(f.note for f in found if f.note))
    return Report(tuple(f.site() for f in found), type(source).__name__, notes, others=tuple(others))
