"""How a configuration is made small: rows of attribute names and what becomes of their values.

A row caps a number at a size; it never raises one. The first row whose expression matches the whole name decides.
`WIDTHS` may break a model whose widths depend on one another in its own way, so a second attempt leaves them out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Rows = tuple[tuple[str, int], ...]

KEEP = (
    r"num_channels|in_channels|in_chans|.*feat_extract_layers|num_residual_layers|num_adapter_layers|.*_feature_layer|"
    r".*num_feature_levels|hidden_act|.*_norm_eps|.*_token_size|num_buckets|.*_head_depth|num_key_value_shared_layers"
)
COUNTS: Rows = (
    (r"(.*_)?num_kv_shared_layers|num_nextn_predict_layers|mtp_num_hidden_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(.*_)?(num_hidden_layers|num_layers|n_layers?|depth|layers|num_blocks)|num_.*_layers|max_window_layers", 2),
    (r"(.*_)?vocab_size(_.*)?", 256),
    (r"moe_num_experts|(.*_)?num_(local_|routed_)?experts|n_routed_experts|num_fc_experts", 4),
    (r"n_shared_experts|(moe_)?num_shared_experts|n_group|topk_group|num_expert_groups?", 1),
    (r"num_experts_per_tok(en)?|num_selected_experts|top_?k(_experts)?|moe_top_?k|moe_k|.*_experts_top_?k", 2),
    (r"(.*_)?(n_positions|max_position_embeddings|seq_len|n_ctx|context_length)", 512),
    (r"max_(source|target)_positions", 64),
    (r"(.*_)?(sliding_window(_size)?|attention_window|attention_chunk_size|local_window|window_attention_size)", 8),
    (r"index_topk|num_queries|num_object_queries|max_seq_length|num_denoising", 8),
    (r"num_query_tokens|latent_query_num|num_learnable_queries|(.*_)?(n|num)_latents", 4),
    (r"(.*_)?num_frames", 4),
)
SIZES: Rows = (
    (r"(.*_)?chunk_size|context_size|block_size", 8),
    (r"qk_(rope|nope)_head_dim|rotary_dim|mamba_d_state|state_size|ssm_state_size", 8),
    (r"n_mamba_heads|mamba_n_?heads|mamba_num_heads", 8),
    (r"(.*_)?(head_dim|d_kv|d_head|dim_head|kv_channels|head_size|d_qk|attention_head_size)|mamba_d_head", 16),
    (r"(.*_)?lora_rank|(.*_)?lora_dim|mamba_dt_rank|time_step_rank", 16),
    (r"linear_num_key_heads", 2),
    (r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|.*_heads)", 4),
)
WIDTHS: Rows = (
    (r"upsample_groups", 64),
    (r"moe_.*intermediate_size|.*expert_intermediate_size|moe_ffn_hidden_size", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|mlp_dim|ffn_size|intermediate_dim)", 64),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|dim|emb_dim|embedding_size|projection_dim|proj_dim|"
        r"hidden_channels|hidden_units|lru_width|out_hidden_size|pooler_output_size|width|embedding_dim|projection_size)",
        64,
    ),
)
PIXELS: Rows = (
    (r"(.*_)?image_size|input_size|crop_size|img_size", 32),
    (r"(.*_)?patch_size", 8),
    (r"num_position_embeddings", 64),
    (r"num_patches", 16),
)
LISTED: Mapping[str, int] = {
    "hidden_sizes": 32, "embed_dims": 32, "encoder_hidden_sizes": 32, "neck_hidden_sizes": 32, "conv_dim": 32,
    "dims": 32, "tdnn_dim": 32, "attention_window": 8, "num_attention_heads": 2, "num_heads": 2,
}  # fmt: skip
"""Lists of widths: the first entry becomes this number and the others keep their ratio to it."""

LEVELS: Mapping[int, tuple[Rows, ...]] = {
    0: (COUNTS, SIZES, WIDTHS, PIXELS),
    1: (COUNTS, PIXELS),
}
"""The attempts, smallest first: everything, then all but widths, which may depend on one another."""

Overrides = Mapping[str, Mapping[str, Any]]


def cap(name: str, value: int, level: int) -> int:
    """The value that the rows of this level leave of an integer attribute."""
    if re.fullmatch(KEEP, name):
        return value
    for rows in LEVELS[level]:
        for pattern, most in rows:
            if re.fullmatch(pattern, name):
                return min(value, most)
    return value


def scale(name: str, values: list[int], level: int) -> list[int]:
    """A list of widths or head counts, scaled so that the first is small and the ratios stay."""
    if level or name not in LISTED or not values or values[0] <= LISTED[name]:
        return values
    return [max(1, round(v / values[0])) * LISTED[name] for v in values]
