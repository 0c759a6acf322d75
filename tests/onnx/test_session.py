"""Models that ONNX Runtime runs, and its refusals on one line."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import AttnoptError, OptionError
from attnopt.onnx.session import Session, SessionError, check_runtime

helper = pytest.importorskip("onnx").helper
pytest.importorskip("onnxruntime")


def _model(op: str) -> bytes:
    ends = [helper.make_tensor_value_info(n, 1, ["n"]) for n in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10).SerializeToString()


def test_tensors_go_in_by_name_and_come_out_in_order() -> None:
    x = torch.tensor([1.0, -2.0])
    assert torch.equal(Session(_model("Neg"), threads=1)(["x", "unused"], [x, x])[0], -x)


def test_refusals_are_errors_of_one_line() -> None:
    with pytest.raises(SessionError, match="^ONNX Runtime: .*NoSuch"):
        Session(_model("NoSuch"))
    with pytest.raises(SessionError, match="^ONNX Runtime: ") as raised:
        Session(_model("Neg"))(["x"], [torch.zeros(2, dtype=torch.int64)])
    assert "\n" not in str(raised.value)
    assert issubclass(SessionError, AttnoptError)


def test_an_opset_that_the_runtime_does_not_read_is_one_clear_error() -> None:
    for opset in (23, 24, 25):
        check_runtime(opset)
    with pytest.raises(
        OptionError, match=r"onnxruntime \S+ reads no model of opset 99: take a newer one, a lower opset"
    ):
        check_runtime(99)
