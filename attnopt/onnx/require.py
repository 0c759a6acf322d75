"""What an export needs: packages, an opset, a place to write to. One clear error each."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from attnopt.errors import OptionError
from attnopt.onnx.operators import OPSETS

TARGETS = ("onnx", "ort")


def package(name: str, what: str) -> Any:
    """The package, imported now. Raises `OptionError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f"{what} needs the package {name}, which cannot be imported ({error}): pip install 'attnopt[onnx]'."
        ) from None


def check_target(target: object, opset: object) -> None:
    """Raise `OptionError` for a target or an opset that is not known."""
    if target not in TARGETS:
        raise OptionError(f"target={target!r} is unknown; choose one of {', '.join(TARGETS)}.")
    low, high = OPSETS
    if isinstance(opset, bool) or not isinstance(opset, int) or not low <= opset <= high:
        raise OptionError(
            f"opset={opset!r} is not supported: ai.onnx.Attention exists from opset {low} on, and the exporter of "
            f"torch writes up to {high}. Choose one of {', '.join(map(str, range(low, high + 1)))}."
        )


def check_path(path: object) -> Path:
    """The path of the file to write. Raises `OptionError` unless it can be written."""
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path must be a file name, not {type(path).__name__}.")
    target = Path(path)
    folder = target.parent
    if target.is_dir() or not target.name:
        raise OptionError(f"path={str(path)!r} is a folder; give the name of a file in it, such as model.onnx.")
    if not folder.is_dir():
        raise OptionError(f"path={str(path)!r} cannot be written: the folder {str(folder)!r} does not exist.")
    if not os.access(folder, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise OptionError(f"path={str(path)!r} cannot be written: permission denied.")
    return target
