"""What the general rules do not know: settings of one model type, also where it is part of another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RESNET = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1],
        "out_features": ["stage4"], "layer_type": "basic",
    },
}  # fmt: skip
_SWIN = {"embed_dim": 32, "num_heads": [2, 4, 8, 16], "image_size": 64, "patch_size": 2, "window_size": 4}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_SERIES = {"prediction_length": 6, "context_length": 12}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "detr": _RESNET,
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deformable_detr": _RESNET,
    "table-transformer": _RESNET,
    "autoformer": {**_SERIES, "label_length": 6},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "dots1": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_ocr2_text": {**_EXPERTS, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "glm4v_text": {"hidden_size": 256},
    "glm4v_moe_text": {"hidden_size": 512},
    "glm_image_text": {"hidden_size": 256},
    "ernie4_5_vl_moe_text": {"hidden_size": 512},
    "align": {"projection_dim": 640},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_omni_talker": _MROPE,
    "paddleocr_vl_text": _MROPE,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"d_model": 64, "d_latents": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "xlm": {"emb_dim": 64},
}
