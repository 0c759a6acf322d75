"""The ways in which an architecture is run: eager, sdpa, and the decode step over a dynamic and a static cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from attnopt.coverage import diffusion
from attnopt.coverage.build import BuildError, Built, build, one_line, scatter
from attnopt.coverage.catalogue import model_class
from attnopt.coverage.decode import decode
from attnopt.coverage.inputs import Inputs

VARIANTS = ("eager", "sdpa", "decode", "decode-static")


class NotApplicable(Exception):  # noqa: N818  (an answer, not an error)
    """The architecture has no such variant; the message says why."""


def variant(model_type: str, name: str, level: int | None = None) -> tuple[nn.Module, Inputs, Built]:
    """The module of a variant with its inputs. Raises `BuildError`; `NotApplicable` where there is no such variant."""
    if model_type.startswith(diffusion.PREFIX):
        return _diffusion(model_type, name)
    if name == "sdpa" and not getattr(_class(model_type), "_supports_sdpa", True):
        raise NotApplicable("the model has no sdpa implementation of its own")
    built = build(model_type, "sdpa" if name == "sdpa" else "eager", level)
    if name in ("eager", "sdpa"):
        return built.model, built.inputs, built
    keeps = "past_key_values" in inspect.signature(built.model.forward).parameters
    if not keeps or not (built.causal or built.model.config.is_encoder_decoder):
        raise NotApplicable("the model keeps no cache")
    try:
        step, inputs = decode(built, static=name == "decode-static")
    except Exception as error:
        raise NotApplicable(f"no decode step: {one_line(error)}") from error
    return step, inputs, built


def _diffusion(model_type: str, name: str) -> tuple[nn.Module, Inputs, Built]:
    if name not in ("eager", "sdpa"):
        raise NotApplicable("the model keeps no cache")
    try:
        model, inputs = diffusion.make(model_type, name)
    except LookupError as error:
        raise NotApplicable(str(error)) from error
    except Exception as error:
        raise BuildError(one_line(error)) from error
    scatter(model)
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        if name == "sdpa":
            raise BuildError(one_line(error)) from error
        raise NotApplicable(f"its attention cannot be written out: {one_line(error)}") from error
    return model, inputs, Built(model, inputs, 0, False)


def _class(model_type: str) -> Any:
    try:
        return model_class(model_type)
    except Exception:
        return None  # `build` says why


__all__ = ["VARIANTS", "BuildError", "NotApplicable", "variant"]
