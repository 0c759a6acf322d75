"""`torch.export` as capture needs it: quiet, without decisions that a mask's values would make, and on the CPU too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer

from attnopt.errors import OptionError

_LOUD = ("torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export")


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, set[str]]:
    """The program, and the names of the `torch.autograd.Function`s that were called. Raises what `torch.export` does.

    `flex_attention` has no gradient on a CPU, and a model whose parameters want one runs there under `no_grad` only:
    so does the second attempt.
    """

    def attempt() -> torch.export.ExportedProgram:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)

    with _own_gradients() as functions, _masks_as_data(), _quiet():
        try:
            return attempt(), functions
        except NotImplementedError:
            functions.clear()
            with torch.no_grad():
                return attempt(), functions


@contextlib.contextmanager
def _masks_as_data() -> Iterator[None]:
    """`nn.Transformer`'s stacks compare a mask with the causal one, to pass a hint; a trace has no values to compare.

    The hint changes no result: where it is False the mask itself is applied.
    """
    original = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = original


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What fails here is told by the error, and may still be captured otherwise: no partial graphs on the terminal."""
    from torch.export import _trace  # loads Dynamo: a second that `import attnopt` does not cost

    levels = {name: logging.getLogger(name).level for name in _LOUD}
    _trace.print = lambda *_, **__: None  # type: ignore[attr-defined]
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        del _trace.print  # type: ignore[attr-defined]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _own_gradients() -> Iterator[set[str]]:
    """The names of the `torch.autograd.Function`s, other than torch's own, that are called meanwhile."""
    functions: set[str] = set()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            functions.add(cls.__name__)
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield functions
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def check_shapes(error: BaseException, dynamic_shapes: Any, model: nn.Module) -> None:
    """Raise `OptionError` if the error says that `dynamic_shapes` has another structure than the inputs."""
    kind = getattr(getattr(error, "error_type", None), "name", "")  # torch's own class would load Dynamo
    said = str(error).strip().split("\n")[0]
    if dynamic_shapes is not None and kind == "INVALID_INPUT" and "dynamic_shapes" in said:
        raise OptionError(f"dynamic_shapes does not fit the inputs of {type(model).__name__}: {said}") from error
