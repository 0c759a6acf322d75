"""Reading a configuration for inputs, and the inputs of architectures that no general rule reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


def read(config: Any, name: str) -> Any:
    """An attribute, or None where there is none for the whole model (some differ from layer to layer)."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def setting(config: Any, *names: str) -> Any:
    """The first of these attributes that the configuration has a value for, or None."""
    for name in names:
        value = read(config, name)
        if value is not None:
            return value
    return None


def find_config(config: Any, *names: str) -> Any:
    """The configuration, or the nearest one inside it, that has one of these attributes; None if there is none."""
    if setting(config, *names) is not None:
        return config
    inner = [read(config, f.name) for f in dataclasses.fields(config)]
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


def _decisions(context: Any, parameters: Any) -> dict[str, Any]:
    """A trajectory, as the decision transformer takes it."""
    steps, config = 7, context.config
    return {
        "states": torch.randn(2, steps, config.state_dim),
        "actions": torch.randn(2, steps, config.act_dim),
        "returns_to_go": torch.randn(2, steps, 1),
        "timesteps": torch.arange(steps).expand(2, steps).contiguous(),
        "attention_mask": torch.ones(2, steps, dtype=torch.long),
    }


def _spectrogram(context: Any, parameters: Any) -> dict[str, Any]:
    """A spectrogram of the length that the positions were made for `[batch, frames, bins]`."""
    return {"input_values": torch.randn(2, context.config.max_length, context.config.num_mel_bins)}


def _query_states(context: Any, parameters: Any) -> dict[str, Any]:
    """Learned queries over the states of a frozen encoder."""
    out = {
        "query_embeds": torch.randn(2, 4, context.config.hidden_size),
        "encoder_hidden_states": torch.randn(2, 9, context.config.encoder_hidden_size),
    }
    if "input_ids" in parameters:
        out |= {"input_ids": torch.randint(5, 100, (2, 7)), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    return out


def _clap(context: Any, parameters: Any) -> dict[str, Any]:
    """A spectrogram of one channel `[batch, 1, frames, bins]`, with a text where the model takes one."""
    audio = find_config(context.config, "num_mel_bins", "spec_size")
    out = {"input_features": torch.randn(2, 1, 61, int(audio.num_mel_bins))}
    if "input_ids" in parameters:
        out["input_ids"] = torch.randint(5, 100, (2, 13))
    return out


def _frames(context: Any, parameters: Any) -> dict[str, Any]:
    """Pieces of sound, each of one length, side by side `[bins, frames]`."""
    features = torch.randn(int(context.config.num_mel_bins), 122)
    return {"input_features": features, "feature_lens": torch.tensor([61, 61])}


def _flattened(context: Any, parameters: Any) -> dict[str, Any]:
    """Patches of an image behind their row and column, both from one, as Pix2Struct takes them."""
    places = torch.stack(torch.meshgrid(torch.arange(1, 4), torch.arange(1, 5), indexing="ij"), -1).view(1, 12, 2)
    width = find_config(context.config, "patch_embed_hidden_size").patch_embed_hidden_size
    return {"flattened_patches": torch.cat([places.expand(2, 12, 2).float(), torch.randn(2, 12, width)], -1)}


def _codebooks(context: Any, parameters: Any) -> dict[str, Any]:
    """One row of codes for each codebook of each text, as MusicGen's decoder takes them."""
    rows = 2 * int(context.config.num_codebooks)
    return {"input_ids": torch.randint(5, 100, (rows, 13)), "use_cache": False}


def _regions(context: Any, parameters: Any) -> dict[str, Any]:
    """A text with the features and the boxes of six regions of an image."""
    return {
        "input_ids": torch.randint(5, 100, (2, 13)),
        "attention_mask": torch.ones(2, 13, dtype=torch.long),
        "visual_feats": torch.randn(2, 6, int(context.config.visual_feat_dim)),
        "visual_pos": torch.rand(2, 6, 4),
    }


def _masked_window(context: Any, parameters: Any) -> dict[str, Any]:
    """A spectrogram of a fixed window of which the second row fills a part `[batch, bins, frames]`."""
    frames = 2 * int(context.config.max_source_positions)
    mask = torch.ones(2, frames, dtype=torch.long)
    mask[1, frames // 2 :] = 0
    return {"input_features": torch.randn(2, int(context.config.num_mel_bins), frames), "input_features_mask": mask}


SPECIAL: Mapping[str, Callable[[Any, Any], dict[str, Any]]] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "decision_transformer": _decisions,
    "audio-spectrogram-transformer": _spectrogram,
    "blip_2_qformer": _query_states,
    "instructblip_qformer": _query_states,
    "instructblipvideo_qformer": _query_states,
    "audioflamingo3_encoder": _masked_window,
    "kosmos_2_5_vision_model": _flattened,
    "pix2struct_vision_model": _flattened,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "lxmert": _regions,
    "clap": _clap,
    "clap_audio_model": _clap,
    "qwen2_5_omni_audio_encoder": _frames,
    "qwen3_omni_moe_audio_encoder": _frames,
    "patchtst": _patches,
    "patchtsmixer": _patches,
}
