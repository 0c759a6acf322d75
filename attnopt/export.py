"""The `export` sub-command: a model to an ONNX file, with the report printed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnopt.errors import OptionError, UnfusedError
from attnopt.target import load

_DYNAMIC = re.compile(r"(\w+):(\d+=[A-Za-z_]\w*(?:,\d+=[A-Za-z_]\w*)*)")


def register(commands: Any) -> None:
    """Add the sub-command to the parser."""
    command = commands.add_parser("export", help="write a model as an ONNX file whose attention is operators")
    add = command.add_argument
    add("model", help="package.module:factory, which returns (model, args, kwargs), or hf:MODEL_TYPE")
    add("--out", required=True, metavar="PATH", help="the file to write")
    add("--target", default="onnx", help="onnx for ai.onnx operators, ort for those of ONNX Runtime too (onnx)")
    add("--opset", type=int, default=23, help="23, 24 or 25 (23)")
    add(
        "--dynamic", action="append", default=[], metavar="INPUT:DIM=NAME,...",
        help="dimensions of an input that may vary, such as input_ids:0=batch,1=tokens; may be repeated",
    )  # fmt: skip
    add("--external-data", action="store_true", help="put the weights into a file beside the model")
    add("--no-validate", action="store_true", help="do not run and compare the file in ONNX Runtime")
    add("--strict", action="store_true", help="exit with 1, and write nothing, if any attention is no operator")
    add("--json", metavar="PATH", help="also write the report as JSON")
    add("--tokens", type=int, default=128, help="sequence length for hf: models (128)")
    add("--layers", type=int, default=2, help="layers for hf: models (2)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export and print the report; 1 if `--strict` is not met. Raises `OptionError` before any work that is in vain."""
    from attnopt.onnx import export
    from attnopt.onnx.require import check_path, check_target

    check_target(arguments.target, arguments.opset)
    path = check_path(arguments.out)
    if arguments.json:
        check_path(arguments.json)
    model, args, kwargs = load(arguments.model, arguments.layers, arguments.tokens)
    try:
        report = export(
            model.eval(), args, path, kwargs, target=arguments.target, opset=arguments.opset,
            dynamic_shapes=dynamic(arguments.dynamic, model, args, kwargs), external_data=arguments.external_data,
            validate=not arguments.no_validate, strict=arguments.strict,
        )  # fmt: skip
    except UnfusedError as error:
        print(f"attnopt: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"\nwritten: {path}")
    if arguments.json:
        Path(arguments.json).write_text(report.to_json() + "\n", encoding="utf-8")
    return 0


def dynamic(given: Sequence[str], model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The dimensions that may vary, by input; None for none. Raises `OptionError` for what is no input of the model."""
    from attnopt.onnx.naming import parameters

    if not given:
        return None
    shapes: dict[str, Any] = dict.fromkeys([*parameters(model)[: len(args)], *kwargs])
    for text in given:
        found = _DYNAMIC.fullmatch(text)
        if found is None:
            raise OptionError(f"--dynamic {text!r} is not INPUT:DIM=NAME,...: write input_ids:0=batch,1=tokens.")
        name, dims = found.groups()
        if name not in shapes:
            raise OptionError(f"--dynamic {text!r}: the model is called without {name!r}; it has {', '.join(shapes)}.")
        shapes[name] = {int(dim): label for dim, label in (part.split("=") for part in dims.split(","))}
    return shapes
