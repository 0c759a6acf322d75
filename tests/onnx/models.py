"""Tiny Hugging Face models with random weights, each with inputs and the sizes that may vary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

hf = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Subject:
    """A model, its inputs, and what exports for either target are expected to have of each operator; {} is not tried."""

    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    onnx: dict[str, int]
    ort: dict[str, int]

    def __str__(self) -> str:
        return self.name


def _ids(batch: int = 2, length: int = 9, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _padded(side: str, batch: int = 2, length: int = 9) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return mask


def _model(kind: type[nn.Module], config: Any) -> nn.Module:
    torch.manual_seed(0)
    config.use_cache = False
    return kind(config).eval()


def bert(attention: str = "eager") -> tuple[nn.Module, dict[str, Any]]:
    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, attn_implementation=attention,
    )  # fmt: skip
    return _model(hf.BertModel, config), {"input_ids": _ids(), "attention_mask": _padded("right")}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, attn_implementation="eager", bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return _model(hf.GPT2LMHeadModel, config), {"input_ids": _ids()}


def gpt2_padded() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = gpt2()
    return model, {**inputs, "attention_mask": _padded("right")}


def _llama_config(**more: Any) -> Any:
    return hf.LlamaConfig(**{
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, **more,
    })  # fmt: skip


def llama() -> tuple[nn.Module, dict[str, Any]]:
    return _model(hf.LlamaForCausalLM, _llama_config(attn_implementation="sdpa")), {"input_ids": _ids()}


def llama_left() -> tuple[nn.Module, dict[str, Any]]:
    inputs = {"input_ids": _ids(), "attention_mask": _padded("left")}
    return _model(hf.LlamaForCausalLM, _llama_config(attn_implementation="eager")), inputs


def gemma2() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.Gemma2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, sliding_window=4, query_pre_attn_scalar=8, attn_implementation="eager",
        max_position_embeddings=64,
    )  # fmt: skip
    return _model(hf.Gemma2ForCausalLM, config), {"input_ids": _ids()}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, attn_implementation="eager",
    )  # fmt: skip
    inputs = {"input_ids": _ids(), "attention_mask": _padded("right"), "decoder_input_ids": _ids(2, 6)}
    return _model(hf.T5ForConditionalGeneration, config), inputs


def swin() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    return _model(hf.SwinModel, config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        attn_implementation="eager",
    )  # fmt: skip
    return _model(hf.ViTModel, config), {"pixel_values": torch.randn(2, 3, 32, 32)}


ATTENTION, HEADS, GROUPED = (
    "ai.onnx.Attention-23",
    "com.microsoft.MultiHeadAttention",
    "com.microsoft.GroupQueryAttention",
)

SUBJECTS = (
    Subject("gpt2", gpt2, {ATTENTION: 1}, {}),
    Subject("llama", llama, {}, {GROUPED: 1}),
    Subject("t5", t5, {ATTENTION: 3}, {}),
    Subject("swin", swin, {}, {HEADS: 3}),
    Subject("vit", vit, {ATTENTION: 1}, {}),
    Subject("gemma2", gemma2, {ATTENTION: 2}, {}),
)
