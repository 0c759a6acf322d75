"""Example inputs from a forward's signature: padded batches of odd lengths, texts, images and sound."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnopt.coverage.features import SPECIAL, find_config, setting

BATCH, TOKENS, TARGETS = 2, 13, 7
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What the makers read: the model, its configuration, and whether it decodes (padding stands on the left)."""

    model: Any
    config: Any
    causal: bool

    @property
    def text(self) -> Any:
        """The configuration of the text part, or the whole configuration."""
        get = getattr(self.config, "get_text_config", None)
        try:
            return get() if get is not None else self.config
        except ValueError:
            return self.config

    @property
    def width(self) -> int:
        """The width of the model's hidden states."""
        return int(setting(self.text, "hidden_size", "d_model", "n_embd", "dim") or 64)


def ids(context: Context, length: int = TOKENS) -> torch.Tensor:
    """Token ids `[batch, length]` that are none of the special tokens."""
    most = min(int(setting(context.text, "vocab_size") or 100), 100)
    return torch.randint(min(5, most - 1), most, (BATCH, length))


def mask(context: Context, length: int = TOKENS) -> torch.Tensor:
    """A padding mask `[batch, length]`: the second row is shorter, padded on the left for decoders."""
    out = torch.ones(BATCH, length, dtype=torch.long)
    if context.causal:
        out[1, : length // 3] = 0
    else:
        out[1, length - length // 3 :] = 0
    return out


def pixels(context: Context, *before: int) -> torch.Tensor:
    """Images `[batch, *before, channels, height, width]` of the size that the configuration names."""
    vision = find_config(context.config, "image_size", "num_channels", "patch_size") or context.config
    size = setting(vision, "image_size", "input_size", "img_size", "pretrain_image_size") or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = setting(vision, "num_channels", "in_channels", "in_chans") or 3
    return torch.randn(BATCH, *before, channels if isinstance(channels, int) else 3, height, width)


def video(context: Context) -> torch.Tensor:
    """Frames `[batch, frames, channels, height, width]`."""
    frames = setting(find_config(context.config, "num_frames") or context.config, "num_frames") or 4
    return pixels(context, int(frames))


def mel(context: Context) -> torch.Tensor:
    """A spectrogram `[batch, bins, frames]`, or `[batch, frames, bins]` for models without a fixed window."""
    audio = find_config(context.config, "num_mel_bins", "feature_size", "input_feat_per_channel") or context.config
    bins = int(setting(audio, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim") or 80)
    window = setting(audio, "max_source_positions")
    fixed = isinstance(window, int) and setting(audio, "input_feat_per_channel") is None
    return torch.randn(BATCH, bins, 2 * window) if fixed else torch.randn(BATCH, 61, bins)


def _frames(spectrogram: torch.Tensor) -> int:
    """The longer of the last two dimensions is time where the window is fixed; else the middle one is."""
    return spectrogram.shape[1] if spectrogram.shape[1] == 61 else spectrogram.shape[2]


def wave(context: Context) -> torch.Tensor:
    """A waveform `[batch, samples]`, with a channel dimension for codecs."""
    channels = setting(context.config, "audio_channels", "num_channels")
    codec = setting(context.config, "codebook_size", "upsampling_ratios") is not None
    return torch.randn(BATCH, channels or 1, 1920) if codec else torch.randn(BATCH, 2000)


def states(context: Context) -> torch.Tensor:
    """Hidden states of another model, for cross-attention `[batch, 9, width]`."""
    width = setting(context.config, "cross_attention_hidden_size", "encoder_hidden_size") or context.width
    return torch.randn(BATCH, 9, int(width))


def boxes(context: Context) -> torch.Tensor:
    """Boxes of the words of a page `[batch, length, 4]`."""
    corner = torch.randint(0, 30, (BATCH, TOKENS, 2))
    return torch.cat([corner, corner + torch.randint(1, 20, (BATCH, TOKENS, 2))], -1)


MAKERS: Mapping[str, Callable[[Context], Any]] = {
    "input_ids": ids,
    "attention_mask": mask,
    "decoder_input_ids": lambda c: ids(c, TARGETS),
    "decoder_attention_mask": lambda c: torch.ones(BATCH, TARGETS, dtype=torch.long),
    "pixel_values": pixels,
    "pixel_values_videos": video,
    "pixel_values_images": pixels,
    "input_features": mel,
    "input_values": wave,
    "audio_values": wave,
    "bbox": boxes,
    "encoder_hidden_states": states,
    "inputs_embeds": lambda c: torch.randn(BATCH, TOKENS, c.width),
    "hidden_states": lambda c: torch.randn(BATCH, TOKENS, c.width),
    "query_embeds": lambda c: torch.randn(BATCH, 4, c.width),
    "image": pixels,
    "grid_thw": lambda c: GRID.clone(),
    "image_grid_thw": lambda c: GRID.clone(),
    "input_features_mask": lambda c: torch.ones(BATCH, _frames(mel(c)), dtype=torch.long),
    "feature_lens": lambda c: torch.tensor([61, 61]),
    "inputs": lambda c: torch.randn(BATCH, TOKENS, c.width),
    "context": lambda c: torch.randn(BATCH, TOKENS, c.width),
    "states": lambda c: torch.randn(BATCH, TARGETS, c.config.state_dim),
    "token_type_ids": lambda c: torch.zeros(BATCH, TOKENS, dtype=torch.long),
}
"""One row for each argument that can be made without knowing the model."""

_WANTED = ("input_ids", "pixel_values", "input_features", "input_values", "bbox", "decoder_input_ids")
"""Arguments that are given even where the signature has a default for them."""


GRID = torch.tensor([[1, 4, 4], [1, 4, 8]])
"""Frames, rows and columns of patches of the two images that models with one sequence of patches take."""


def patches(context: Context) -> torch.Tensor:
    """Flattened patches of the images of `GRID` `[patches, channels * frames * side * side]`."""
    vision = find_config(context.config, "patch_size") or context.config
    frames = setting(vision, "temporal_patch_size") or 1
    channels = setting(vision, "num_channels", "in_channels", "in_chans") or 3
    return torch.randn(int(GRID.prod(-1).sum()), channels * frames * vision.patch_size**2)


def make_inputs(model: Any, config: Any, causal: bool) -> Inputs:
    """Keyword arguments of the model's forward. Raises `LookupError` for a required argument that has no maker."""
    torch.manual_seed(1)
    context = Context(model, config, causal)
    special = SPECIAL.get(config.model_type)
    parameters = inspect.signature(model.forward).parameters
    if special is not None:
        return special(context, parameters)
    given = {n: MAKERS[n](context) for n in _chosen(model, config, parameters)}
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            if name not in MAKERS:
                raise LookupError(f"no example for the required argument {name!r}")
            given.setdefault(name, MAKERS[name](context))
    if "grid_thw" in given:
        given |= {n: patches(context) for n in ("hidden_states", "pixel_values") if n in given}
    if "input_ids" in given and "attention_mask" in parameters:
        given["attention_mask"] = mask(context)
    if "use_cache" in parameters:
        given["use_cache"] = False
    return given


def _chosen(model: Any, config: Any, parameters: Any) -> list[str]:
    main = getattr(model, "main_input_name", "input_ids")
    chosen = [n for n in _WANTED if n in parameters and (n != "decoder_input_ids" or config.is_encoder_decoder)]
    if main in MAKERS and main in parameters and main not in chosen:
        chosen.append(main)
    if "input_features" in chosen and "input_values" in chosen:
        chosen.remove("input_values")
    if not chosen:
        chosen = [n for n in ("inputs_embeds", "hidden_states", "pixel_values_videos") if n in parameters][:1]
    return chosen


def reduced(given: Inputs, error: Exception, model: Any, config: Any) -> list[Inputs]:
    """Other inputs to try after a forward failed: image tokens as the message asks for, then one tower by itself."""
    out: list[Inputs] = []
    wanted = re.search(r"tokens?:?\s*(?:n_image_tokens)?\s*(\d+).*features:?\s*(\d+)", str(error))
    token = setting(config, "image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    if wanted and token is not None and "input_ids" in given:
        count = max(1, int(wanted[2]) // BATCH)
        ids_, images = given["input_ids"], given["input_ids"].new_full((BATCH, count), token)
        tokens = torch.cat([ids_[:, :2], images, ids_], 1)
        longer = {**given, "input_ids": tokens}
        if "attention_mask" in given:
            longer["attention_mask"] = torch.ones_like(tokens)
            longer["attention_mask"][1, :2] = 0
        out.append(longer)
    sounds = [n for n in ("input_features", "input_values") if n in given and given[n].dim() == 3]
    out.extend({**given, n: given[n].transpose(1, 2).contiguous()} for n in sounds)
    towers = ("pixel_values", "input_features", "input_values")
    if "input_ids" in given and any(n in given for n in towers):
        out.append({n: v for n, v in given.items() if n not in towers})
    if any(n in given for n in towers) and "input_ids" in given:
        out.append({n: v for n, v in given.items() if n not in ("input_ids", "attention_mask", "decoder_input_ids")})
    if "attention_mask" in given:
        out.append({n: v for n, v in given.items() if n != "attention_mask"})
    return out
