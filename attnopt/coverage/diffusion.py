"""Models of diffusers, from small configurations: one row a model, with the settings and the inputs of its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

PREFIX = "diffusers:"
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        settings: arguments of the class.
        shapes: floating-point inputs by name, drawn at random.
        more: inputs that are not drawn from a normal distribution, made when called.
    """

    settings: Mapping[str, Any]
    shapes: Mapping[str, Sizes]
    more: Callable[[], Mapping[str, Any]] = field(default=dict)


def names() -> tuple[str, ...]:
    """The names of the rows, if diffusers is installed."""
    return tuple(f"{PREFIX}{name}" for name in ROWS) if find_spec("diffusers") is not None else ()


def make(name: str, attention: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a row in eval mode, with its inputs. Raises `LookupError` where it has no such attention."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    row = ROWS[name.removeprefix(PREFIX)]
    torch.manual_seed(0)
    model = getattr(diffusers, name.removeprefix(PREFIX))(**row.settings).eval()
    if attention == "eager" and not _by_hand(model):
        raise LookupError("the model has one implementation, which calls scaled_dot_product_attention")
    torch.manual_seed(1)
    return model, {**{n: torch.randn(shape) for n, shape in row.shapes.items()}, **row.more()}


def _by_hand(model: torch.nn.Module) -> bool:
    """Give every plain attention the processor that writes it out; whether there was one."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    found = [m for m in model.modules() if isinstance(m, Attention) and isinstance(m.processor, AttnProcessor2_0)]
    for module in found:
        module.set_processor(AttnProcessor())
    return bool(found)


def _time() -> dict[str, Any]:
    return {"timestep": torch.tensor([3, 700])}


def _unit_time() -> dict[str, Any]:
    return {"timestep": torch.tensor([0.25, 0.5])}


def _dit() -> dict[str, Any]:
    return {**_time(), "class_labels": torch.tensor([1, 2])}


def _padded(name: str, length: int, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    mask = torch.ones(2, length, dtype=dtype)
    mask[1, length - 3 :] = 0
    return {name: mask}


def _text(length: int = 9, name: str = "encoder_attention_mask") -> Callable[[], dict[str, Any]]:
    return lambda: {**_time(), **_padded(name, length)}


def _flux() -> dict[str, Any]:
    places = torch.zeros(16, 3)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {**_unit_time(), "img_ids": places, "txt_ids": torch.zeros(9, 3)}


_UNET = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8, "norm_num_groups": 8,
}  # fmt: skip
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}

ROWS: Mapping[str, Row] = {
    "UNet2DConditionModel": Row(
        _UNET, {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 9, 32)}, _text()
    ),
    "UNet2DModel": Row(
        {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8,
         "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        {"sample": (2, 3, 16, 16)}, _time,
    ),
    "DiTTransformer2DModel": Row(
        {**_HEADS, "num_layers": 2, "in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2,
         "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        {"hidden_states": (2, 4, 8, 8)}, _dit,
    ),
    "FluxTransformer2DModel": Row(
        {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 9, 32), "pooled_projections": (2, 32)}, _flux,
    ),
    "SD3Transformer2DModel": Row(
        {**_HEADS, "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 32,
         "caption_projection_dim": 32, "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 16,
         "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        {"hidden_states": (2, 4, 16, 16), "encoder_hidden_states": (2, 9, 32), "pooled_projections": (2, 64)}, _time,
    ),
    "PixArtTransformer2DModel": Row(
        {**_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
         "cross_attention_dim": 32, "caption_channels": 32, "norm_num_groups": 4},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 9, 32)},
        lambda: {**_text()(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "WanTransformer3DModel": Row(
        {**_HEADS, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32,
         "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32, "attention_head_dim": 12},
        {"hidden_states": (2, 4, 2, 8, 8), "encoder_hidden_states": (2, 9, 16)}, _time,
    ),
    "HunyuanVideoTransformer3DModel": Row(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16,
         "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4), "guidance_embeds": True},
        {"hidden_states": (2, 4, 2, 6, 6), "encoder_hidden_states": (2, 9, 16), "pooled_projections": (2, 8)},
        lambda: {**_text()(), "guidance": torch.tensor([1000.0, 2000.0])},
    ),
    "AutoencoderKL": Row(
        {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "latent_channels": 4,
         "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        {"sample": (2, 3, 16, 16)},
    ),
    "Transformer2DModel": Row(
        {**_HEADS, "in_channels": 32, "num_layers": 2, "cross_attention_dim": 32, "norm_num_groups": 8},
        {"hidden_states": (2, 32, 6, 6), "encoder_hidden_states": (2, 9, 32)},
        lambda: _padded("encoder_attention_mask", 9),
    ),
    "AuraFlowTransformer2DModel": Row(
        {**_HEADS, "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
         "num_single_dit_layers": 1, "joint_attention_dim": 32, "caption_projection_dim": 32,
         "pos_embed_max_size": 256},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 9, 32)}, _unit_time,
    ),
    "CogVideoXTransformer3DModel": Row(
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
         "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
         "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 8},
        {"hidden_states": (2, 3, 4, 8, 8), "encoder_hidden_states": (2, 8, 8)}, _time,
    ),
    "SanaTransformer2DModel": Row(
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
         "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 8},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 9, 8)}, _text(),
    ),
    "LTXVideoTransformer3DModel": Row(
        {"in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8,
         "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16, "qk_norm": "rms_norm_across_heads"},
        {"hidden_states": (2, 32, 8), "encoder_hidden_states": (2, 9, 16)},
        lambda: {**_text()(), "num_frames": 2, "height": 4, "width": 4},
    ),
    "LuminaNextDiT2DModel": Row(
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
         "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "cross_attention_dim": 32,
         "scaling_factor": 1.0},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 9, 32)},
        lambda: {**_unit_time(), **_padded("encoder_mask", 9), "cross_attention_kwargs": {},
                 "image_rotary_emb": torch.randn(24, 24, 4).to(torch.complex64)},
    ),
    "MochiTransformer3DModel": Row(
        {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 8, "time_embed_dim": 4,
         "max_sequence_length": 16},
        {"hidden_states": (2, 4, 2, 8, 8), "encoder_hidden_states": (2, 9, 8)},
        lambda: {**_time(), **_padded("encoder_attention_mask", 9, torch.bool)},
    ),
    "QwenImageTransformer2DModel": Row(
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
        {"hidden_states": (2, 16, 16), "encoder_hidden_states": (2, 9, 16)},
        lambda: {**_unit_time(), **_padded("encoder_hidden_states_mask", 9), "img_shapes": [[(1, 4, 4)]] * 2},
    ),
    "HunyuanDiT2DModel": Row(
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8,
         "patch_size": 2, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "hidden_size": 32, "text_len": 4,
         "text_len_t5": 4, "pooled_projection_dim": 8, "mlp_ratio": 1.0, "activation_fn": "gelu-approximate"},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 4, 16), "encoder_hidden_states_t5": (2, 4, 16)},
        lambda: {"timestep": torch.tensor([3.0, 700.0]), "text_embedding_mask": torch.ones(2, 4),
                 "text_embedding_mask_t5": torch.ones(2, 4),
                 "image_meta_size": torch.ones(2, 6), "style": torch.zeros(2, dtype=torch.long),
                 "image_rotary_emb": (torch.randn(16, 16), torch.randn(16, 16))},
    ),
    "PriorTransformer": Row(
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 16, "num_embeddings": 7,
         "additional_embeddings": 4},
        {"hidden_states": (2, 16), "proj_embedding": (2, 16), "encoder_hidden_states": (2, 7, 16)},
        lambda: {**_time(), **_padded("attention_mask", 7, torch.bool)},
    ),
}  # fmt: skip
"""The models, smallest sizes that keep every kind of block."""
