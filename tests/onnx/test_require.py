"""Missing packages, unknown targets, unsupported opsets, paths that cannot be written: one clear error each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attnopt.errors import OptionError
from attnopt.onnx.require import check_path, check_target, package


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        OptionError, match=r"attnopt.onnx.export needs the package onnxscript.*pip install 'attnopt\[onnx\]'"
    ):
        package("onnxscript", "attnopt.onnx.export")
    assert package("json", "a test").dumps([]) == "[]"


@pytest.mark.parametrize("opset", [22, 26, 23.0, True, "23", None])
def test_an_opset_that_is_not_supported_is_refused(opset: object) -> None:
    with pytest.raises(OptionError, match=r"is not supported.*Choose one of 23, 24, 25"):
        check_target("onnx", opset)


def test_known_targets_and_opsets_pass() -> None:
    for opset in (23, 24, 25):
        check_target("onnx", opset)
        check_target("ort", opset)
    with pytest.raises(OptionError, match="target='ONNX' is unknown; choose one of onnx, ort"):
        check_target("ONNX", 23)


def test_a_path_must_be_a_file_in_a_folder_that_can_be_written(tmp_path: Path) -> None:
    assert check_path(str(tmp_path / "m.onnx")) == tmp_path / "m.onnx"
    with pytest.raises(OptionError, match="is a folder; give the name of a file"):
        check_path(tmp_path)
    with pytest.raises(OptionError, match="does not exist"):
        check_path(tmp_path / "no" / "m.onnx")
    with pytest.raises(OptionError, match="path must be a file name, not int"):
        check_path(3)


def test_a_file_that_is_no_folder_cannot_hold_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="does not exist"):
        check_path(tmp_path / "file" / "m.onnx")
