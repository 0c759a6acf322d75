"""A lowered graph as an ONNX model, by the exporter of torch."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt.errors import CaptureError
from attnopt.module import Compiled
from attnopt.onnx.require import package

# Protocol buffers end at 2 GiB: weights above this go to a file of their own.
_MOST_BYTES = 1_800_000_000


class Exportable(nn.Module):
    """The forward of a compiled graph over the tensors among its inputs; states keep the names of the model."""

    def __init__(self, tree: nn.Module, compiled: Compiled) -> None:
        super().__init__()
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, held, getattr(tree, held))
        object.__setattr__(self, "_compiled", compiled)
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> list[Any]:
        """The tensors among the flattened results."""
        compiled, given = self._compiled, iter(tensors)
        leaves = [leaf.constant if leaf.dtype is None else next(given) for leaf in compiled.captured.leaves]
        results = compiled.run(*(held[name] for held, name in compiled.slots), *leaves)
        return [x for x in results if isinstance(x, torch.Tensor)]


def dynamic(compiled: Compiled, names: Mapping[str, str]) -> Any:
    """The dimensions that vary of every tensor input, as `torch.export` takes them; None where none does.

    Sizes that were one in the capture are one again, under the user's name where there is one.
    """
    captured = compiled.captured
    plain = {n for leaf in captured.leaves for n in leaf.sizes if isinstance(n, str) and n.isidentifier()}
    made = {}
    for n in sorted(plain):
        low, high = captured.ranges.get(n, (0, 2**62))
        limits = {"max": high} if high < 2**31 else {}
        made[n] = torch.export.Dim(names.get(n, n), min=max(low, 0), **limits)
    said = [
        {i: made.get(n, torch.export.Dim.DYNAMIC) for i, n in enumerate(leaf.sizes) if isinstance(n, str)}
        for leaf in captured.leaves
        if leaf.dtype is not None
    ]
    return (tuple(said),) if any(said) else None


def build(
    module: nn.Module, tensors: Sequence[torch.Tensor], opset: int, shapes: Any = None,
    inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """The exporter's program. Raises `CaptureError` with its first line where it cannot translate the graph."""
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module, tuple(tensors), dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False,
                input_names=inputs, output_names=outputs, external_data=False, optimize=False,
            )  # fmt: skip
            _simplify(program)
    except Exception as error:
        lines = [line.strip() for line in f"{error.__cause__ or error}".splitlines() if line.strip()]
        raise CaptureError(
            f"torch.onnx.export could not translate the model: {type(error.__cause__ or error).__name__}: "
            f"{lines[0] if lines else ''}"
        ) from error
    return program


def _simplify(program: Any) -> None:
    """Fold constants, and let layers share what they compute alike, such as their mask.

    Not by `program.optimize`: at opset 23 its fusion of rotary embeddings may drop the broadcast over the batch, and
    ONNX Runtime refuses the result.
    """
    package("onnxscript.optimizer", "attnopt.onnx.export").optimize(program.model)
    passes = package("onnx_ir.passes.common", "attnopt.onnx.export")
    passes.CommonSubexpressionEliminationPass()(program.model)
    passes.RemoveUnusedNodesPass()(program.model)


def save(program: Any, path: Path, external: bool) -> tuple[Path, ...]:
    """Write the model into a folder of its own. Returns its files; the first is the model, weights may follow."""
    size = sum(t.nbytes for t in (v.const_value for v in program.model.graph.initializers.values()) if t is not None)
    program.save(str(path), external_data=external or size > _MOST_BYTES)
    return tuple(sorted(path.parent.iterdir(), key=lambda p: p.name != path.name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages and versions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.onnx._internal.exporter")]
    levels = [x.level for x in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in loggers:
            x.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for x, level in zip(loggers, levels, strict=True):
                x.setLevel(level)


def tensors_of(compiled: Compiled, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors among the inputs, as `Exportable` takes them."""
    leaves = compiled.captured.flatten(args, kwargs)
    return [x for x, leaf in zip(leaves, compiled.captured.leaves, strict=True) if leaf.dtype is not None]
