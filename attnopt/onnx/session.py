"""Running an ONNX model in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from attnopt.errors import AttnoptError, OptionError
from attnopt.onnx.require import package


class SessionError(AttnoptError):
    """ONNX Runtime refused a model, or failed to run it."""


class Session:
    """A loaded model; calls take and give tensors.

    `basic` leaves out ONNX Runtime's extended optimisations: its fusion of a scale into a product rounds the scale to
    fp32, in fp64 models too.
    """

    def __init__(self, model: Path | bytes, threads: int = 0, basic: bool = False) -> None:
        ort = package("onnxruntime", "checking an export")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        if basic:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            given = model if isinstance(model, bytes) else str(model)
            self.session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise SessionError(_told(error)) from error

    def __call__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The model's outputs for inputs of these names; those that the model does not take are left out."""
        wanted = {x.name for x in self.session.get_inputs()}
        feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True) if n in wanted}
        try:
            return [torch.from_numpy(x) for x in self.session.run(None, feed)]
        except Exception as error:
            raise SessionError(_told(error)) from error


def check_runtime(opset: int) -> None:
    """Raise `OptionError` unless the installed ONNX Runtime reads models of this opset."""
    ort, helper = package("onnxruntime", "checking an export"), package("onnx", "checking an export").helper
    ends = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "opset", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    try:
        Session(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), threads=1)
    except SessionError as error:
        raise OptionError(
            f"onnxruntime {ort.__version__} reads no model of opset {opset}: take a newer one, a lower opset, or "
            f"validate=False to write the file unchecked ({error})."
        ) from None


def _told(error: Exception) -> str:
    """ONNX Runtime's message on one line, without its internals' addresses."""
    text = " ".join(str(error).split())
    return f"ONNX Runtime: {text[:300]}"
