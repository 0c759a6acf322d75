"""A small configuration of the same architecture: few layers, one of every kind, narrow, with a short vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

from attnopt.coverage.features import read
from attnopt.coverage.overrides import OVERRIDES
from attnopt.coverage.rules import cap, scale

_PLAIN = {
    "transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
}  # fmt: skip
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_FIRST_TOKEN = 128
_MOST_KINDS = 6


def shrink(config: Any, level: int = 0) -> Any:
    """A new configuration of the same class, made small by the rows of `rules` and the row of `overrides`."""
    return _Shrink(level).config(config)


class _Shrink:
    """One run over a configuration and those inside it; equal special tokens stay equal."""

    def __init__(self, level: int) -> None:
        self.level = level
        self.tokens: dict[int, int] = {}

    def config(self, config: Any) -> Any:
        """The small configuration."""
        settings: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            if field.name in _PLAIN or field.name.startswith("_"):
                continue
            value = read(config, field.name)
            if _is_config(value):
                settings[field.name] = self.config(value)
                continue
            derived = field.default is None and not isinstance(value, dict)
            small = self.value(field.name, value)
            if small != value and (not derived or field.name.endswith(("_token_id", "_token_index"))):
                settings[field.name] = small
        settings.update(self.heads(config, settings))
        settings.update(self.layers(config))
        settings.update(OVERRIDES.get(config.model_type, {}))
        return type(config)(**settings)

    def value(self, name: str, value: Any) -> Any:
        """The small value of one attribute."""
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            if name.endswith(("token_id", "token_index")) and value >= _FIRST_TOKEN:
                return self.token(value)
            return cap(name, value, self.level)
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
            if name.endswith(("token_id", "token_ids")):
                return [self.token(v) if v >= _FIRST_TOKEN else v for v in value]
            if name == "depths":
                return type(value)(min(v, 2) for v in value)
            if name.endswith(("image_size", "patch_size")):
                return type(value)(cap(name, v, self.level) for v in value)
            return type(value)(scale(name, list(value), self.level))
        if isinstance(value, dict):
            return {k: self.rope(k, v) for k, v in value.items()}
        return value

    def rope(self, name: str, value: Any) -> Any:
        """Sections of a multi-axis RoPE, which add up to half a head."""
        if isinstance(value, dict):
            return {k: self.rope(k, v) for k, v in value.items()}
        if name == "mrope_section" and not self.level and isinstance(value, (list, tuple)):
            return [2, 3, 3]
        return value

    def token(self, value: int) -> int:
        """A special token beyond the short vocabulary gets a place at its end."""
        return self.tokens.setdefault(value, _FIRST_TOKEN + len(self.tokens))

    def heads(self, config: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Two key heads where keys have fewer heads than queries, as many as queries where they have as many."""
        if self.level:
            return {}
        names = {f.name: f for f in dataclasses.fields(config)}
        out = {}
        for name in ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num"):
            if name not in names or names[name].default is None:
                continue
            value = read(config, name)
            heads = read(config, "num_attention_heads") or value
            if isinstance(value, int) and isinstance(heads, int):
                out[name] = min(heads, 4) if value >= heads else min(value, 2)
        return out

    def layers(self, config: Any) -> dict[str, Any]:
        """The first layer of every kind where the configuration lists its layers' kinds."""
        names = {f.name for f in dataclasses.fields(config)}
        depth_name = next((n for n in _DEPTHS if n in names and isinstance(read(config, n), int)), None)
        if depth_name is None:
            return {}
        depth = read(config, depth_name)
        lists = {
            n: list(read(config, n))
            for n in names
            if isinstance(read(config, n), (list, tuple)) and len(read(config, n)) == depth > 2
        }
        if not lists:
            return {}
        first: dict[Any, int] = {}
        for i, kinds in enumerate(zip(*lists.values(), strict=True)):
            first.setdefault(str(kinds), i)
        chosen = sorted(first.values())[:_MOST_KINDS]
        chosen = chosen if len(chosen) > 1 else [0, 1]
        return {depth_name: len(chosen), **{n: [kinds[i] for i in chosen] for n, kinds in lists.items()}}


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and dataclasses.is_dataclass(value)
