"""The subject's shape, its checkpoint of eight bits a weight, and its loss.

A Llama of six layers and eight heads over bytes, built from `transformers`. Matrices are stored as int8 with one fp32
scale an output row and are read back to fp32; vectors are stored as they are. Figures are those of the model read back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
WEIGHTS, RECIPE, EXCERPT = HERE / "subject.safetensors", HERE / "subject.json", HERE / "heldout.txt"
SEED = 1234
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
STEPS_OF_INT8 = 127


def new_subject(seed: int = SEED, attention: str = "sdpa") -> LlamaForCausalLM:
    """The subject before training, fp32; `attention` is the implementation that `transformers` is asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_subject(model: nn.Module, about: dict[str, Any], weights: Path = WEIGHTS, recipe: Path = RECIPE) -> None:
    """Write the checkpoint, int8 a matrix, and `about` as JSON beside it."""
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    for name, p in model.named_parameters():  # tied weights come once
        p = p.detach().float()
        if p.dim() < 2:
            stored[name] = p.clone()
            continue
        scale = (p.abs().amax(dim=1, keepdim=True) / STEPS_OF_INT8).clamp_min(1e-12)
        stored[name], stored[f"{name}.scale"] = (p / scale).round().to(torch.int8), scale
    for path, write in ((weights, lambda at: save_file(stored, at)), (recipe, lambda at: _write_json(at, about))):
        beside = path.with_name(path.name + ".part")
        write(beside)
        beside.chmod(0o644)
        beside.replace(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def load_subject(weights: Path = WEIGHTS, attention: str = "sdpa") -> LlamaForCausalLM:
    """The trained subject, fp32, in evaluation mode. Needs the extra `hf`."""
    from safetensors.torch import load_file

    stored = load_file(weights)
    model = new_subject(attention=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = stored.get(f"{name}.scale")
            p.copy_(stored[name] if scale is None else stored[name].float() * scale)
    return model.eval()


def recipe(path: Path = RECIPE) -> dict[str, Any]:
    """How the subject was trained and what it reached; losses in nats a byte."""
    return dict(json.loads(path.read_text()))


def heldout_excerpt(path: Path = EXCERPT) -> Tensor:
    """A few kilobytes of held-out text as windows of bytes: (windows, 1024), int64."""
    data = path.read_bytes()
    return windows(data, 1024, len(data) // 1024)


def windows(data: bytes, length: int, count: int) -> Tensor:
    """`count` windows of `length` bytes, evenly spread over `data`: (count, length), int64."""
    last = len(data) - length
    starts = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return torch.stack([torch.frombuffer(bytearray(data[s : s + length]), dtype=torch.uint8) for s in starts]).long()


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor, batch: int = 4) -> float:
    """Mean loss of the next byte, nats, over windows (count, length)."""
    total = 0.0
    for part in ids.split(batch):
        out = model(part)
        total += next_byte_loss(out if isinstance(out, Tensor) else out.logits, part, reduction="sum").item()
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def next_byte_loss(logits: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of byte i + 1 given the bytes up to i: logits (B, S, 256), ids (B, S)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction)
