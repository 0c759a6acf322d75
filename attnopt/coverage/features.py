"""Reading a configuration for inputs, and the inputs of architectures that no general rule reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


def setting(config: Any, *names: str) -> Any:
    """The first of these attributes that the configuration has a value for, or None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def find_config(config: Any, *names: str) -> Any:
    """The configuration, or the nearest one inside it, that has one of these attributes; None if there is none."""
    if setting(config, *names) is not None:
        return config
    inner = [getattr(config, f.name, None) for f in dataclasses.fields(config)]
    found = (find_config(c, *names) for c in inner if hasattr(c, "model_type") and dataclasses.is_dataclass(c))
    return next((c for c in found if c is not None), None)


def _series(context: Any, parameters: Any) -> dict[str, Any]:
    """Values of a time series with their lags, as Autoformer, Informer and the time-series transformer take them."""
    config = context.config
    past = config.context_length + max(config.lags_sequence)
    out = {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length),
        "future_time_features": torch.randn(2, config.prediction_length, config.num_time_features),
        "use_cache": False,
    }
    return {n: v for n, v in out.items() if n in parameters}


def _patches(context: Any, parameters: Any) -> dict[str, Any]:
    """Values of a time series `[batch, length, channels]`."""
    return {"past_values": torch.randn(2, context.config.context_length, context.config.num_input_channels)}


SPECIAL: Mapping[str, Callable[[Any, Any], dict[str, Any]]] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "patchtst": _patches,
    "patchtsmixer": _patches,
}
