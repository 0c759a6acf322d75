"""One architecture, built small with random weights, with inputs on which its forward runs."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnopt.coverage.catalogue import model_class, transformers
from attnopt.coverage.inputs import Inputs, make_inputs, reduced
from attnopt.coverage.rules import LEVELS
from attnopt.coverage.shrink import shrink
from attnopt.errors import AttnoptError

_MOST_PARAMETERS = 60_000_000
_SPREAD = 0.1


class BuildError(AttnoptError):
    """An architecture that cannot be built small or run; the message is the reason, in one line."""


@dataclass(frozen=True)
class Built:
    """A model in eval mode, keyword arguments its forward accepts, and how it was reached."""

    model: nn.Module
    inputs: Inputs
    level: int
    causal: bool


def build(model_type: str, attention: str = "eager", level: int | None = None) -> Built:
    """The smallest model of this type that runs. Raises `BuildError` with the reason of the first attempt."""
    package = transformers()
    try:
        config = package.CONFIG_MAPPING[model_type]()
        cls = model_class(model_type)
    except Exception as error:
        raise BuildError(f"the default configuration has no model: {one_line(error)}") from error
    reasons = []
    for attempt in LEVELS if level is None else (level,):
        try:
            return _attempt(cls, shrink(config, attempt), attention, attempt)
        except Exception as error:
            if os.environ.get("ATTNOPT_COVERAGE_DEBUG"):
                import traceback

                traceback.print_exc()
            reasons.append(one_line(error))
    raise BuildError(reasons[0])


def _attempt(cls: Any, config: Any, attention: str, level: int) -> Built:
    config._attn_implementation = attention
    _settle(config)
    if level:
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > _MOST_PARAMETERS:
            raise BuildError(f"it would have {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = cls(config).eval().float()
    scatter(model)
    causal = "past_key_values" in inspect.signature(model.forward).parameters
    causal = causal and not config.is_encoder_decoder and getattr(config, "is_decoder", True)
    given = make_inputs(model, config, causal)
    queue, first = [given], None
    while queue:
        given = queue.pop(0)
        try:
            with torch.no_grad():
                model(**given)
            return Built(model, given, level, causal)
        except Exception as error:
            if first is None:
                first = error
                queue.extend(reduced(given, error, model, config))
    assert first is not None
    raise first


def _settle(config: Any) -> None:
    """No cache in the outputs. Experts by batched products: the grouped kernel has no fp64, a loop is no one graph."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None and hasattr(part, "_experts_implementation"):
            part._experts_implementation = "batched_mm"
        if part is not None and hasattr(part, "use_cache"):
            part.use_cache = False


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Noise on every parameter: gates that start at zero and equal norms would hide a wrong attention."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            spread = _SPREAD if parameter.dim() > 1 else _SPREAD / 5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def one_line(error: BaseException) -> str:
    """The type and the beginning of an error's message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__
