"""A written model is held to the PyTorch model's results, on other sizes too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attnopt.capture import capture
from attnopt.errors import ValidationError
from attnopt.onnx.check import check_file, other_leaves, verdict

pytest.importorskip("onnx")


class _Model(nn.Module):
    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.to(torch.float32).softmax(-1)
        return wide * 3, ids + 1


def _captured(**more: object):
    x, ids = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    return capture(_Model(), (x, ids), {}, **more), [x, ids]


def _verdict(change) -> object:
    captured, leaves = _captured()

    def session(names, tensors):
        assert names == ["x", "ids"]
        return change([t for t in captured.gm(*tensors)])

    return verdict(captured.gm, [], leaves, session, ["x", "ids"])


def test_equal_results_pass_and_are_compared_with_fp64() -> None:
    found = _verdict(lambda out: out)
    assert found.ok
    assert found.rms == found.rms_eager > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out: [out[0] * (1 + 1e-5), out[1]], "rms error above"),
        (lambda out: [out[0], out[1] + 1], "integers or truth values differ"),
        (lambda out: [out[0][:3], out[1]], "the results have the shapes"),
    ],
)
def test_results_that_differ_do_not(change, reason: str) -> None:
    found = _verdict(change)
    assert not found.ok
    assert reason in found.reason


def test_other_sizes_are_one_smaller_where_they_may_be() -> None:
    varies = torch.export.Dim.DYNAMIC
    captured, leaves = _captured(dynamic_shapes={"x": {0: varies}, "ids": {0: varies}})
    x, ids = other_leaves(captured, leaves)
    assert (x.shape, ids.tolist()) == ((3, 6), [0, 1, 2])
    assert torch.equal(x, leaves[0][:3])
    captured, leaves = _captured()
    assert other_leaves(captured, leaves) is None


def test_the_smallest_size_grows_by_repetition() -> None:
    x, ids, varies = torch.randn(2, 6), torch.arange(2), torch.export.Dim.DYNAMIC
    captured = capture(_Model(), (x, ids), {}, {"x": {0: varies}, "ids": {0: varies}})
    assert other_leaves(captured, [x, ids])[1].tolist() == [0, 1, 0]


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a\x12\x00")
    with pytest.raises(ValidationError, match=r"onnx\.checker refuses m\.onnx"):
        check_file(tmp_path / "m.onnx")
