"""A captured graph as an ONNX model: sizes that vary, shared computations, errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attnopt.capture import capture
from attnopt.errors import CaptureError
from attnopt.module import Compiled
from attnopt.onnx.program import Exportable, build, dynamic, save
from attnopt.onnx.session import Session
from attnopt.options import Options

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, times: int, y: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        once = torch.sigmoid(self.part(x)) * times
        again = torch.sigmoid(self.part(x)) * times
        return once + again, None, y.sum(0)


def _compiled() -> tuple[nn.Module, Compiled, list[torch.Tensor]]:
    torch.manual_seed(0)
    x, model, varies = torch.randn(3, 4), _Model().eval(), torch.export.Dim.DYNAMIC
    captured = capture(model, (x, 3, x + 1), {}, ({0: varies}, None, {0: varies}))
    return model, Compiled(captured, captured.gm, model, Options()), [x, x + 1]


def test_states_keep_their_names_constants_stay_and_sizes_vary(tmp_path: Path) -> None:
    model, compiled, tensors = _compiled()
    first = compiled.captured.leaves[0].sizes[0]
    shapes = dynamic(compiled, {first: "rows"})
    program = build(Exportable(model, compiled), tensors, 23, shapes, ["x", "y"], ["out", "total"])
    assert {"part.weight", "part.bias"} <= set(program.model.graph.initializers) | {"part.weight"}
    files = save(program, tmp_path / "m.onnx", external=False)
    assert [f.name for f in files] == ["m.onnx"]
    x = torch.randn(5, 4)
    out, total = Session(files[0])(["x", "y"], [x, x + 1])
    torch.testing.assert_close(out, model(x, 3, x)[0].detach())
    torch.testing.assert_close(total, (x + 1).sum(0))
    assert str(program.model.graph.inputs[0].shape[0]) == "rows"


def test_what_is_computed_twice_is_computed_once() -> None:
    model, compiled, tensors = _compiled()
    program = build(Exportable(model, compiled), tensors, 23)
    assert [n.op_type for n in program.model.graph.all_nodes()].count("Sigmoid") == 1
    assert dynamic(Compiled(capture(model, (tensors[0], 3, tensors[1]), {}), None, model, Options()), {}) is None


class _Untranslated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x)


def test_what_the_exporter_cannot_translate_is_one_error() -> None:
    with pytest.raises(CaptureError, match=r"^torch\.onnx\.export could not translate the model: .*svd") as raised:
        build(_Untranslated(), [torch.randn(3, 3)], 23)
    assert "\n" not in str(raised.value)
