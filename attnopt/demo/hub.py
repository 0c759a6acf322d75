"""A Hugging Face model by its type alone: its configuration, random weights, inputs that fit. No download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnopt.errors import OptionError

_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer")


def from_config(kind: str, layers: int, tokens: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model of this type with few layers, in eval mode, with inputs. Raises `OptionError` for an unknown type."""
    try:
        import transformers
    except ImportError:
        raise OptionError("hf: models come from transformers: pip install 'attnopt[hf]'.") from None
    transformers.utils.logging.set_verbosity_error()
    if kind not in transformers.CONFIG_MAPPING:
        raise OptionError(f"transformers {transformers.__version__} knows no model type {kind!r}.")
    config = transformers.AutoConfig.for_model(kind)
    for name in _LAYERS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, layers)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:layers]
    config.use_cache = False
    torch.manual_seed(0)
    try:
        model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    except ValueError as error:
        raise OptionError(f"transformers cannot build a {kind!r} from its type alone: {error}") from error
    return model, (), _inputs(model, config, tokens)


def _inputs(model: nn.Module, config: Any, tokens: int) -> dict[str, Any]:
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        side = getattr(config, "image_size", 224)
        height, width = (side, side) if isinstance(side, int) else side
        return {name: torch.randn(1, getattr(config, "num_channels", 3), height, width)}
    if name != "input_ids":
        raise OptionError(f"this model takes {name!r}; write a function that returns (model, args, kwargs) for it.")
    limit = getattr(config, "max_position_embeddings", None)
    length = min(tokens, limit) if isinstance(limit, int) and limit > 0 else tokens
    ids = torch.randint(0, min(1000, config.vocab_size), (1, length))
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
