"""The decode step as a module of flat tensors: one new token against a key-value cache that was filled by a prefill."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attnopt.coverage.build import Built
from attnopt.coverage.inputs import Inputs

ROOM = 24
"""Slots of a static cache."""
_ENCODED = ("input_ids", "input_features", "input_values", "attention_mask")
# Model types whose step is given all tokens so far and takes its own part.
_WHOLE = frozenset({"cpmant"})


class DecodeStep(nn.Module):
    """The model's step over a cache whose tensors are inputs; returns the logits and the tensors after the step.

    The cache object is rebuilt in every call from a template, so that the module keeps nothing between calls and any
    kind of cache layer is served: full, sliding, static, linear, or the pair of an encoder-decoder.
    """

    def __init__(self, model: nn.Module, template: Any) -> None:
        super().__init__()
        self.model = model
        self.template = template

    def forward(self, cache: list[torch.Tensor], **inputs: Any) -> tuple[Any, list[torch.Tensor]]:
        """One step. `cache` holds the tensors of the template in the order of `slots`; none of them is changed."""
        fresh = skeleton(self.template)
        for (holder, name), tensor in zip(slots(fresh), cache, strict=True):
            setattr(holder, name, tensor.clone())
        out = self.model(**inputs, past_key_values=fresh, use_cache=True, return_dict=True)
        return out[0], [getattr(holder, name) for holder, name in slots(fresh)]


def slots(cache: Any) -> Iterator[tuple[Any, str]]:
    """Every tensor that the cache holds, as the object that has it and its name there."""
    for part in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, part):
            yield from slots(getattr(cache, part))
    for layer in getattr(cache, "layers", ()):
        for name, value in sorted(vars(layer).items()):
            if isinstance(value, torch.Tensor):
                yield layer, name
            elif isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):
                raise TypeError(f"the cache keeps a list of tensors, {name}")


def skeleton(cache: Any) -> Any:
    """A copy of the cache's objects that shares its tensors."""
    fresh = copy.copy(cache)
    for part in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, part):
            setattr(fresh, part, skeleton(getattr(cache, part)))
    if "layers" in vars(cache):
        fresh.layers = [copy.copy(layer) for layer in cache.layers]
    if hasattr(cache, "is_updated"):
        fresh.is_updated = dict(cache.is_updated)
    return fresh


def decode(built: Built, static: bool) -> tuple[DecodeStep, Inputs]:
    """The step after a prefill of the model's own inputs. Raises what the model raises, `TypeError` for others."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    model, given = built.model, dict(built.inputs)
    given.pop("use_cache", None)
    if static:
        config = model.config.get_text_config(decoder=True)
        cache = StaticCache(config=config, max_cache_len=ROOM)
        # What the decoder reads of the encoder has a length of its own, no window, and is written once.
        pair = model.config.is_encoder_decoder
        given["past_key_values"] = EncoderDecoderCache(cache, DynamicCache()) if pair else cache
    with torch.no_grad():
        cache = model(**given, use_cache=True, return_dict=True).past_key_values
    if not hasattr(cache, "layers") and not hasattr(cache, "self_attention_cache"):
        raise TypeError(f"its state is a {type(cache).__name__}, which is no key-value cache")
    tensors = [getattr(holder, name) for holder, name in slots(cache)]
    if not any(t.dim() == 4 for t in tensors):
        raise TypeError("its state holds no keys and values")
    return DecodeStep(model, cache), {"cache": [t.clone() for t in tensors], **_step(built, given)}


def _step(built: Built, given: Inputs) -> Inputs:
    """The next token of every row, the mask one longer, and what a decoder still needs of its encoder."""
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.utils import ModelOutput

    names = ("decoder_input_ids", "decoder_attention_mask") if not built.causal else ("input_ids", "attention_mask")
    if names[0] not in given:
        raise TypeError(f"it takes no {names[0]}")
    last = given[names[0]][:, -1:].clone()
    whole = built.model.config.model_type in _WHOLE
    step: Inputs = {names[0]: torch.cat([given[names[0]], last], 1) if whole else last}
    if names[1] in given:
        step[names[1]] = torch.cat([given[names[1]], torch.ones_like(given[names[1]][:, :1])], 1)
    if not built.causal:
        with torch.no_grad():
            keys = {n: v for n, v in given.items() if n in _ENCODED}
            encoded = built.model.get_encoder()(**keys)
        # Some say in their result which of a shortened input is padding, or have fields of their own.
        own = isinstance(encoded, ModelOutput)
        step["encoder_outputs"] = encoded if own else BaseModelOutput(last_hidden_state=encoded[0])
        taken = inspect.signature(built.model.forward).parameters.get("input_ids")
        if taken is not None and taken.default is inspect.Parameter.empty:
            step["input_ids"] = given["input_ids"]
        if "attention_mask" in given and "input_ids" in given:
            step["attention_mask"] = given["attention_mask"]
    return step
