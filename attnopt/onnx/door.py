"""`attnopt.onnx.export`: a model to an ONNX file whose attention is operators, checked and measured."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt import api, dump, pipeline
from attnopt.capture import Captured
from attnopt.errors import AttnoptError, OptionError, UnfusedError, ValidationError
from attnopt.module import Compiled, OptimizedModule
from attnopt.nested import copied
from attnopt.onnx import naming, probe, program
from attnopt.onnx.check import check_file, other_leaves, verdict
from attnopt.onnx.operators import REFERENCE
from attnopt.onnx.require import check_path, check_target, package
from attnopt.onnx.session import Session, check_runtime
from attnopt.onnx.sites import Attention, install
from attnopt.options import Options
from attnopt.patterns.known import Known
from attnopt.report import Figures, Report, Site
from attnopt.runtime import dispatch
from attnopt.runtime.validate import Verdict


def export(
    model: nn.Module, args: tuple[Any, ...], path: str | Path, kwargs: Mapping[str, Any] | None = None, *,
    target: str = "onnx", opset: int = 23, dynamic_shapes: Any = None, rewrites: Sequence[Any] | None = None,
    tolerance: Any = None, calibration: Any = None, external_data: bool = False, validate: bool = True,
    strict: bool = False, options: Options | Mapping[str, Any] | None = None,
) -> Report:  # fmt: skip
    """Write the model as an ONNX file in which every attention that was found is one operator.

    What no operator says stays in the file as the elementary operators that its spec's reference is made of, and the
    report says why. The file is checked, loaded in ONNX Runtime, and compared with the model on the example inputs,
    and at other sizes where sizes may vary.

    Args:
        model: any module in evaluation mode, an `OptimizedModule` among them; it is not changed.
        args, kwargs: example inputs of the forward.
        path: the file to write; weights beyond 1.8 GB go to a file beside it.
        target: `onnx` for `ai.onnx.Attention`; `ort` for whichever operator ONNX Runtime has for the attention,
            those of com.microsoft first.
        opset: 23, 24 or 25.
        dynamic_shapes: as for `torch.export.export`; a dimension may also be given as its name.
        rewrites, tolerance, calibration: as for `attnopt.optimize`.
        external_data: put the weights into a file beside the model, whatever their size.
        validate: probe every operator in ONNX Runtime, check the file, run and compare it.
        strict: raise `UnfusedError` if any attention did not become an operator.
        options: `Options` or a mapping of its fields.

    Returns:
        A report whose sites name their operator in `kernel`; `reference graph` with the reason where there is none.

    Raises:
        OptionError: for an unknown target or opset, one that the installed ONNX Runtime does not read, a path that
            cannot be written, a missing package, a model in training mode. CaptureError: if the model cannot be
            captured or translated. ValidationError: if what was made is not a valid model, cannot be run, or its
            results are not the model's; then no file is written.
    """
    file = _checked_call(model, args, path, kwargs, target, opset, validate)
    fast = _optimized(model, naming.with_dimensions(dynamic_shapes), rewrites, tolerance, calibration, options)
    job = _Job(fast, tuple(args), dict(kwargs or {}), target, opset, dynamic_shapes, external_data, validate, strict)
    settings = fast._build.settings
    with torch.no_grad(), dispatch.use(settings.options), dump.to(settings.options.dump):
        return job.run(file)


def _checked_call(model: Any, args: Any, path: Any, kwargs: Any, target: Any, opset: Any, validate: bool) -> Path:
    """The file to write. Raises `OptionError` for arguments that no export could follow."""
    api.check_call(model, args, kwargs)
    check_target(target, opset)
    file = check_path(path)
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if validate else [])):
        package(name, "attnopt.onnx.export")
    if validate:
        check_runtime(opset)
    if model.training:
        raise OptionError(f"{type(model).__name__} is in training mode; call .eval() on it before it is exported.")
    return file


def _optimized(
    model: nn.Module, shapes: Any, rewrites: Any, tolerance: Any, calibration: Any, options: Any
) -> OptimizedModule:
    """What carries rewrites and their decisions: the module itself if it was optimised before."""
    if not isinstance(model, OptimizedModule):
        settings = api.Settings(
            tuple(rewrites or ()), tolerance, calibration, dynamic_shapes=shapes, options=Options.make(options)
        )
        return OptimizedModule(model, api.Builder(settings))
    if rewrites:
        raise OptionError("the model is an OptimizedModule: its rewrites are made; give the original with rewrites.")
    settings = model._build.settings
    settings = replace(settings, dynamic_shapes=settings.dynamic_shapes if shapes is None else shapes)
    model = model.__deepcopy__({id(t): t for t in (*model.parameters(), *model.buffers())})
    object.__setattr__(model, "_build", api.Builder(settings))
    return model


@dataclass
class _Job:
    """One export: its module, inputs and settings."""

    fast: OptimizedModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: str
    opset: int
    dynamic_shapes: Any
    external: bool
    validate: bool
    strict: bool

    def run(self, path: Path) -> Report:
        """Capture, lower, choose, build, check, write."""
        settings = self.fast._build.settings
        captured = api.captured_for(self.fast, self.args, self.kwargs, settings)
        original = copied(captured.gm)
        known = Known(captured.scalars, captured.tables(self.fast._source))
        found = pipeline.lower(captured.gm, pipeline.find(captured.gm.graph, known, settings.options))
        sites = install(captured.gm, self.target, self.opset)
        compiled = Compiled(captured, captured.gm, self.fast, settings.options)
        states = [held[name] for held, name in compiled.slots]
        leaves = captured.flatten(self.args, self.kwargs)
        if self.validate:
            captured.gm(*states, *leaves)
            probe.choose(sites, self.opset)
        for site in sites:
            site.seen = None
        entries = [_entry(f.site(), [s for s in sites if s.anchor == f.anchor.name]) for f in found]
        decisions = self.fast._decisions or ()
        notes = [f.note for f in found if f.note] + [note for d in decisions for note in d.notes()]
        figures = {d.rewrite: d.figures for d in decisions}
        report = Report(tuple(entries), type(self.fast._source).__name__, tuple(notes), Figures(figures))
        if self.strict and report.declined:
            raise UnfusedError(f"strict=True, and {report.declined} of {len(entries)} sites are no operator:\n{report}")
        try:
            return pipeline.announce(self._written(path, report, compiled, original, states, leaves))
        except OSError as error:
            raise OptionError(f"path={str(path)!r} cannot be written: {error.strerror or error}.") from error

    def _written(
        self, path: Path, report: Report, compiled: Compiled, original: Any, states: Any, leaves: Any
    ) -> Report:
        """The report with the figures of the file, which takes its place only when it has been checked."""
        captured = compiled.captured
        names = naming.input_names(self.fast._source, captured.leaves)
        inputs = [n for n, leaf in zip(names, captured.leaves, strict=True) if leaf.dtype is not None]
        made = self._program(compiled, captured, leaves, inputs)
        notes, figures = list(report.notes), dict(report.figures)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            files = program.save(made, Path(folder) / path.name, self.external)
            figures["onnx"] = _counted(made, self.target, self.opset, files)
            if self.validate:
                loose = any(REFERENCE in (site.kernel or "") for site in report.sites)
                figures |= self._checked(files[0], original, captured, (states, leaves), inputs, notes, loose)
            # The weights first: a model is never there without them.
            for file in reversed(files):
                os.replace(file, path.parent / file.name)
        return replace(report, notes=tuple(notes), figures=figures)

    def _program(self, compiled: Compiled, captured: Captured, leaves: Sequence[Any], inputs: list[str]) -> Any:
        given = (self.args, self.kwargs, naming.parameters(self.fast._source))
        dims = naming.dimension_names(self.dynamic_shapes, given, captured.leaves)
        shapes = program.dynamic(compiled, dims)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        results = next(n for n in captured.gm.graph.nodes if n.op == "output").args[0]
        outputs = naming.output_names(captured.out_spec, inputs)
        outputs = [name for name, x in zip(outputs, results, strict=True) if isinstance(x, torch.fx.Node)]
        return program.build(program.Exportable(self.fast, compiled), tensors, self.opset, shapes, inputs, outputs)

    def _checked(
        self, path: Path, original: Any, captured: Captured, given: tuple[Any, Any], inputs: list[str],
        notes: list[str], loose: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Figures of the comparisons. Raises `ValidationError` if the file is not the model."""
        states, leaves = given
        check_file(path)
        double = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in (*states, *leaves))
        if double:
            notes.append("compared without ONNX Runtime's extended optimisations, which round scales to fp32")
        try:
            session = Session(path, basic=double)
        except AttnoptError as error:
            raise ValidationError(f"the exported model cannot be loaded: {error}") from error
        figures = {"validation": _held(verdict(original, states, leaves, session, inputs, loose), "the example inputs")}
        other = other_leaves(captured, leaves)
        if other is not None:
            shapes = ", ".join(str(list(x.shape)) for x in other if isinstance(x, torch.Tensor))
            try:
                original(*states, *other)
            except Exception as error:
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                notes.append(f"not compared at other sizes ({shapes}): the model itself fails there: {first}")
                return figures
            checked = verdict(original, states, other, session, inputs, loose)
            figures["validation at other sizes"] = {"sizes": shapes, **_held(checked, f"inputs of {shapes}")}
        return figures


def _held(checked: Verdict, where: str) -> dict[str, Any]:
    if not checked.ok:
        raise ValidationError(f"the exported model differs from the PyTorch model on {where}: {checked}")
    return _figures(checked)


def _figures(checked: Verdict) -> dict[str, float]:
    return {"max": checked.max, "rms": checked.rms, "eager_max": checked.max_eager, "eager_rms": checked.rms_eager}


def _entry(site: Site, calls: Sequence[Attention]) -> Site:
    """The report's entry with what its calls became."""
    if not calls:
        return site
    kernels = " + ".join(dict.fromkeys(call.kernel for call in calls))
    verdicts = [call.verdict for call in calls if call.verdict is not None]
    worst = max(verdicts, key=lambda v: v.max, default=None)
    error = None if worst is None else _figures(worst)
    if all(call.operator is not None for call in calls):
        return replace(site, kernel=kernels, error=error)
    reason = "; ".join(dict.fromkeys(r for call in calls if call.operator is None for r in call.reasons))
    return replace(site, status="declined", kernel=kernels, reason=reason, error=error)


def _counted(made: Any, target: str, opset: int, files: Sequence[Path]) -> dict[str, Any]:
    """What the model is made of."""
    nodes = list(made.model.graph.all_nodes())
    counts = Counter(f"{n.domain or 'ai.onnx'}.{n.op_type}" for n in nodes if "Attention" in n.op_type)
    return {
        "target": target, "opset": opset, "nodes": len(nodes),
        "attention": ", ".join(f"{name} x{count}" for name, count in sorted(counts.items())) or "none",
        "bytes": sum(file.stat().st_size for file in files),
    }  # fmt: skip
