"""`optimize` and `explain`: the first door."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from attnopt import dump, pipeline
from attnopt.capture import Captured, capture, share
from attnopt.errors import CaptureError, Decline, OptionError, UnfusedError
from attnopt.fidelity import strayed
from attnopt.module import AsItIs, Compiled, OptimizedModule, full_size
from attnopt.nested import copied
from attnopt.options import Options
from attnopt.passes import approximate
from attnopt.passes.tolerance import Calibration, Tolerance
from attnopt.patterns.known import Known
from attnopt.region import Region
from attnopt.report import Report, Site
from attnopt.runtime import dispatch
from attnopt.validation import validate_graphs

log = logging.getLogger("attnopt")
RESTS = ("eager", "inductor")
# Relative change of a model's output that no order of summation explains, not even in 16 bits.
_MOST_CHANGE = 0.1


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `optimize`, checked."""

    rewrites: tuple[Any, ...] = ()
    tolerance: Any = None
    calibration: Any = None
    dynamic_shapes: Any = None
    rest: str = "eager"
    validate: bool = True
    strict: bool = False
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        if self.rest not in RESTS:
            raise OptionError(f"rest={self.rest!r} is unknown; choose one of {', '.join(RESTS)}.")
        for rewrite in self.rewrites:
            if isinstance(rewrite, type) or not hasattr(rewrite, "decide") or not hasattr(rewrite, "contract"):
                raise OptionError(f"rewrites must be objects from attnopt.rewrites, not {rewrite!r}.")
            loss = getattr(rewrite, "loss", None)
            if loss is not None and not callable(loss):
                raise OptionError(f"{rewrite.name}: loss must be a function of the model's output, not {loss!r}.")
        order = {name: place for place, name in enumerate(approximate.ORDER)}
        ordered = sorted(self.rewrites, key=lambda r: order.get(r.name, len(order)))
        object.__setattr__(self, "rewrites", tuple(ordered))
        object.__setattr__(self, "tolerance", Tolerance.make(self.tolerance))
        if self.rewrites and self.tolerance is None:
            names = ", ".join(r.name for r in self.rewrites)
            raise OptionError(f"{names} is approximate and needs a tolerance: pass tolerance=Tolerance(output=0.05).")


def optimize(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *,
    rewrites: Sequence[Any] | None = None, tolerance: Any = None, calibration: Any = None, dynamic_shapes: Any = None,
    rest: str = "eager", validate: bool = True, strict: bool = False,
    options: Options | Mapping[str, Any] | None = None,
) -> OptimizedModule:  # fmt: skip
    """The model with its attention rewritten: a new module that shares the original's parameters.

    Args:
        model: any module; it is never changed.
        args, kwargs: example inputs of the forward. Without them the first call captures.
        rewrites: approximate rewrites from `attnopt.rewrites`. They are applied in the order `PruneHeads`, `ShareKV`,
            `FactorBias`, then `Sparsify`, `Linearize` and `MixHeads`, whatever order they are given in; several of a
            kind, and those of your own after all others, in the order given. Exact ones always run.
        tolerance: how much the approximate rewrites may change; see `attnopt.rewrites.Tolerance`.
        calibration: inputs on which approximate rewrites are measured: a sequence of args tuples or kwargs dicts. None
            means the example inputs; rewrites that are fitted to data (`ShareKV` aligned, `MixHeads`, learned maps of
            `Linearize`) ask for it.
        dynamic_shapes: as for `torch.export.export`; other sizes raise `ShapeError`.
        rest: what runs everything but attention: `eager` or `inductor`.
        validate: compare every site, and the model's output, before and after on the example inputs.
        strict: raise `UnfusedError` if any site is declined.
        options: `Options` or a mapping of its fields.

    Returns:
        A module with `.report`; outputs keep the types that the original returns.

    Raises:
        OptionError: for unknown rewrites or options. CaptureError: if no graph can be made.
        ShapeError: for inputs that do not fit the model's device or, later, the captured shapes.
    """
    check_call(model, args, kwargs)
    if rewrites is not None and not isinstance(rewrites, Iterable):
        raise OptionError(f"rewrites must be a sequence: write rewrites=[{type(rewrites).__name__}(...)].")
    model = _original(model)
    settings = Settings(
        tuple(rewrites or ()), tolerance, calibration, dynamic_shapes, rest, validate, strict, Options.make(options)
    )
    fast = OptimizedModule(model, Builder(settings))
    if args or kwargs:
        fast.compile_for(tuple(args), dict(kwargs or {}))
    return fast


def explain(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, **same: Any
) -> Report:
    """The report that `optimize` with the same arguments would start from. Changes and compiles nothing."""
    check_call(model, args, kwargs)
    model = _original(model)
    known = {"rewrites", "tolerance", "calibration", "dynamic_shapes", "rest", "validate", "strict", "options"}
    if set(same) - known:
        raise OptionError(f"unknown arguments {sorted(set(same) - known)}; known are {sorted(known)}.")
    options = Options.make(same.get("options"))
    with dump.to(options.dump):
        report = _explained(model, tuple(args), dict(kwargs or {}), same.get("dynamic_shapes"), options)
        return pipeline.announce(report)


def _explained(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any, options: Options) -> Report:
    try:
        captured = capture(share(model), args, kwargs, dynamic_shapes)
    except CaptureError as error:
        from attnopt.dynamo import explain_with_dynamo

        return explain_with_dynamo(share(model), args, kwargs, options, str(error))
    found = pipeline.find(captured.gm.graph, Known(captured.scalars, captured.tables(model)), options)
    others = pipeline.others(captured.gm.graph, found)
    # The captured graph is nobody else's: lowering it finds what only lowering declines, such as active dropout.
    found = pipeline.lower(captured.gm, found, again=True)
    notes = tuple(f.note for f in found if f.note)
    return Report(tuple(f.site() for f in found), type(model).__name__, notes, others=others)


def check_call(model: Any, args: Any, kwargs: Any) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(args, (tuple, list)):
        raise OptionError(f"args must be a tuple of the forward's arguments, not {type(args).__name__}: write (x,).")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise OptionError(f"kwargs must be a mapping of names to inputs, not {type(kwargs).__name__}.")


def _original(model: nn.Module) -> nn.Module:
    """The model itself, or the one that an optimised model was made of: its parameters are the same ones."""
    for name, part in model.named_modules():
        done = [d.rewrite for d in part.__dict__.get("_decisions") or () if d.sites]
        if done:
            raise OptionError(
                f"{name or 'model'} is the result of approximate rewrites ({', '.join(dict.fromkeys(done))}) and its "
                "code is still that of the model before them: optimize that model instead, with all rewrites in one "
                "call; after ShareKV and PruneHeads alone, attnopt.standalone gives one that may be optimized again."
            )
    if not isinstance(model, OptimizedModule):
        return model
    model._source.training = model.training
    return model._source  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Builder:
    """Builds the forward of an `OptimizedModule`; picklable, so that the module is."""

    settings: Settings

    def __call__(self, fast: OptimizedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Report]:
        settings = self.settings
        with dispatch.use(settings.options), dump.to(settings.options.dump):
            return self._build(fast, args, kwargs)

    def _build(self, fast: OptimizedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Report]:
        settings = self.settings
        try:
            captured = capture(full_size(fast), args, kwargs, settings.dynamic_shapes)
        except CaptureError as error:
            from attnopt.dynamo import compile_with_dynamo

            return compile_with_dynamo(fast, args, kwargs, settings, str(error))
        if settings.validate and fast._decisions is None:
            states = [held[name] for held, name in Compiled(captured, captured.gm, fast, settings.options).slots]
            why = strayed(fast._source, captured, states, args, kwargs)
            if why:
                return _as_it_is(fast, captured, settings, why)
        captured = _approximated(fast, captured, args, kwargs, settings)
        return _build(fast, captured, args, kwargs, settings)


def _as_it_is(fast: OptimizedModule, captured: Captured, settings: Settings, why: str) -> tuple[Any, Report]:
    """The original model, and a report that declines every site for this reason."""
    known = Known(captured.scalars, captured.tables(fast._source))
    found = pipeline.find(captured.gm.graph, known, settings.options)
    reason = f"{why}, so it runs as it is"
    left = [replace(f, result=Decline(reason, f.anchor)) if isinstance(f.result, Region) else f for f in found]
    return AsItIs(fast), _finish(fast, [f.site() for f in left], {}, settings, (f"{reason}.",))


def captured_for(fast: OptimizedModule, args: Any, kwargs: Any, settings: Settings) -> Captured:
    """The capture of the module for these inputs, after the approximate rewrites: where every export begins."""
    captured = capture(full_size(fast), args, kwargs, settings.dynamic_shapes)
    return _approximated(fast, captured, args, kwargs, settings)


def _approximated(fast: OptimizedModule, captured: Captured, args: Any, kwargs: Any, settings: Settings) -> Captured:
    """The capture after the approximate rewrites, decided now or, for a module that was rewritten before, then."""
    if not settings.rewrites or settings.options.disable:
        return captured
    if fast._decisions is not None:
        calibration = Calibration(captured.states, (), captured.out_spec)
        done = approximate.repeat(
            captured.gm, settings.rewrites, fast._decisions, calibration, fast.added(), captured.scalars
        )
        return replace(captured, gm=done.gm, states=done.states)
    source = fast._source
    tensors = {**captured.constants, **dict(source.named_buffers(remove_duplicate=False))}
    tensors.update(source.named_parameters(remove_duplicate=False))
    calibration = Calibration.make(captured, settings.calibration, (args, kwargs))
    assert settings.tolerance is not None
    done = approximate.rewrite(
        captured.gm, settings.rewrites, calibration, tensors, captured.scalars, settings.tolerance
    )
    fast.adopt(done.decisions, done.tensors)
    return replace(captured, gm=done.gm, states=done.states)


def _build(
    fast: OptimizedModule, captured: Captured, args: Any, kwargs: Any, settings: Settings,
    failed: Mapping[str, str] | None = None,
) -> tuple[Any, Report]:  # fmt: skip
    """Lower and validate. Sites that fail are left as they are in another round; `failed` holds their reasons."""
    failed, options = dict(failed or {}), settings.options
    original = copied(captured.gm) if settings.validate else None
    known = Known(captured.scalars, captured.tables(fast._source))
    found = [_declined(f, failed) for f in pipeline.find(captured.gm.graph, known, options)]
    found = pipeline.lower(captured.gm, pipeline.leave(found, options), again=True)
    compiled = Compiled(captured, captured.gm, fast, options)
    sites, figures = [f.site() for f in found], {}
    if original is not None:
        inputs = [held[name] for held, name in compiled.slots] + captured.flatten(args, kwargs)
        again, errors, figures = validate_graphs(original, captured.gm, found, inputs, options)
        if not again and _strayed(figures.get("validation", {})):
            again = {f.anchor.name: "the model's output moved although every site agrees" for f in found}
            again = {name: why for name, why in again.items() if name not in failed}
        if again:
            return _build(fast, replace(captured, gm=original), args, kwargs, settings, {**failed, **again})
        sites = [replace(s, error=errors[s.name]) if s.name in errors else s for s in sites]
    if settings.rest == "inductor":
        compiled.run = torch.compile(captured.gm, backend="inductor")
    else:
        pipeline.past_dispatcher(captured.gm)
    sites = [replace(s, kernel=s.kernel or dispatch.kernels(s.spec)) if s.spec is not None else s for s in sites]
    notes = tuple(f.note for f in found if f.note) + _not_as_asked(sites)
    if captured.functions:
        names = ", ".join(captured.functions)
        notes += (f"{names} has a gradient of its own: calls that need gradients run the original model.",)
    return compiled, _finish(fast, sites, figures, settings, notes)


def _not_as_asked(sites: Sequence[Site]) -> tuple[str, ...]:
    """Why a kernel of a site did not run, or not as it was compiled, where it has run."""
    found = ((s.name, dispatch.why_not(term.key)) for s in sites if s.spec is not None for term in s.spec.terms)
    return tuple(dict.fromkeys(f"{name}: {why}" for name, why in found if why))


def _strayed(figures: Mapping[str, float]) -> bool:
    """Whether the whole output moved by more than rounding can explain, whatever the sites say."""
    change, size = figures.get("change_rms", 0.0), figures.get("output_rms", 0.0)
    return not change <= _MOST_CHANGE * size + 1e-6


def _declined(found: pipeline.Found, failed: Mapping[str, str]) -> pipeline.Found:
    if found.anchor.name not in failed or not isinstance(found.result, Region):
        return found
    return replace(found, result=Decline(f"validation failed: {failed[found.anchor.name]}", found.anchor))


def _finish(fast: Any, sites: Sequence[Site], figures: Any, settings: Settings, notes: tuple[str, ...] = ()) -> Report:
    for decision in fast._decisions or ():
        times = sum(name.split(" #")[0] == decision.rewrite for name in figures)
        name = f"{decision.rewrite} #{times + 1}" if times else decision.rewrite
        notes, figures = (*notes, *decision.notes()), {**figures, name: decision.figures}
    report = pipeline.announce(Report(tuple(sites), type(fast._source).__name__, notes, figures))
    if settings.strict and report.declined:
        raise UnfusedError(f"strict=True, and {report.declined} of {len(sites)} sites were declined:\n{report}")
    return report
