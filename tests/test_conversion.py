"""Rewritten models as modules of their own class: decoding into smaller caches, and what cannot be taken out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import attnopt
from attnopt.conversion import standalone
from attnopt.errors import CaptureError, OptionError
from attnopt.rewrites import PruneHeads, ShareKV, Sparsify
from tests.passes.tiny import model as tiny

hf = pytest.importorskip("transformers")
LENGTH = 10


def _ids() -> torch.Tensor:
    return torch.randint(1, 40, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _llama(kv_heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=32,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def _given() -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long), "use_cache": False}


def _fast(model: nn.Module, *rewrites: Any) -> Any:
    given = _given()
    return attnopt.optimize(
        model, (), given, rewrites=rewrites, tolerance=1e9, calibration=[given], validate=False,
        options={"kernel": "reference"},
    )  # fmt: skip


@torch.no_grad()
def _decoded(model: nn.Module, cache: Any) -> torch.Tensor:
    """The logits of one token at a time."""
    ids, found = _ids(), []
    for i in range(LENGTH):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("method", ["mean", "aligned"])
def test_a_decode_loop_computes_the_rewritten_model_over_a_smaller_cache(method: str) -> None:
    model = _llama()
    fast = _fast(model, ShareKV(2, method=method))
    small, given = standalone(fast, (), _given()), _given()
    with torch.no_grad():
        wanted = fast(**given).logits
        assert (model(**given).logits - wanted).abs().max() > 1e-3
    for make in (hf.DynamicCache, lambda config: hf.StaticCache(config=config, max_cache_len=16)):
        cache, whole = make(config=small.config), make(config=model.config)
        assert_close(_decoded(small, cache), wanted, atol=1e-5, rtol=1e-4)
        _decoded(model, whole)
        sizes = [sum(x.keys.numel() + x.values.numel() for x in c.layers) for c in (cache, whole)]
        assert sizes[0] * 2 == sizes[1]
    assert small.config.num_key_value_heads == 2
    assert model.config.num_key_value_heads == 4
    assert all(p is not q for p in small.parameters() for q in fast.parameters())


def test_it_is_optimised_again_with_its_cache_and_saved(tmp_path: Any) -> None:
    small = standalone(_fast(_llama(), ShareKV(2, method="mean")), (), _given())
    small.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(**_given()).logits, small(**_given()).logits)
    report = attnopt.explain(small, (), _given() | {"use_cache": True})
    assert [(s.spec.heads.q, s.spec.heads.k) for s in report.sites] == [(4, 2)] * 2


def test_layers_with_heads_of_their_own_number() -> None:
    fast = _fast(_llama(), PruneHeads(heads={0: [1], 1: [0, 3]}))
    small = standalone(fast, (), _given())
    with torch.no_grad():
        assert_close(small(**_given()).logits, fast(**_given()).logits, atol=1e-5, rtol=1e-4)
    cache = hf.DynamicCache(config=small.config)
    _decoded(small, cache)
    assert [layer.keys.shape[1] for layer in cache.layers] == [3, 2]
    assert small.model.layers[0].self_attn.k_proj.out_features == 12


def test_the_mode_is_that_of_the_optimised_module_which_stays_as_it_is() -> None:
    fast = _fast(_llama(), ShareKV(1, method="mean"))
    fast.train()
    assert standalone(fast, (), _given()).training
    assert fast.training
    assert all(part.training for part in fast.modules())


def test_what_cannot_be_taken_out_is_one_clear_error() -> None:
    x = torch.randn(2, 5, 24)
    with pytest.raises(OptionError, match=r"result of attnopt.optimize, not LlamaForCausalLM"):
        standalone(_llama())  # type: ignore[arg-type]
    exact = attnopt.optimize(tiny("separate")[0], (x,), validate=False)
    with pytest.raises(OptionError, match="no approximate rewrite changed this model"):
        standalone(exact, (x,))
    narrow = _fast(_llama(), ShareKV(2, method="mean"), Sparsify("window", window=4, always=True))
    with pytest.raises(OptionError, match="sparsify changed more than weights"):
        standalone(narrow, (), _given())
    uneven = _fast(_llama(2), PruneHeads(heads={0: [1]}))
    with pytest.raises(OptionError, match="code of LlamaForCausalLM cannot be told its new head counts: it fails"):
        standalone(uneven, (), _given())


def test_a_cache_in_the_result_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"input_ids": _ids()}
    # As where `transformers` has not registered its caches, whatever ran in this process before.
    monkeypatch.delitem(pytree.SUPPORTED_NODES, hf.DynamicCache, raising=False)
    with pytest.raises(CaptureError, match=r"need a whole graph, and there is none\. Pass use_cache=False"):
        attnopt.optimize(_llama(), (), given, rewrites=[ShareKV(2, method="mean")], tolerance=1e9)


class Scaled(nn.Module):
    """Attention whose code takes the scale of the scores from the width of its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, (self.q, self.k, self.v, self.o) = 4, (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.num_heads // t.shape[1], 1) for t in (k, v))
        weights = (q @ k.mT * self.k.out_features / 16).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def test_code_that_computes_something_else_is_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    fast = attnopt.optimize(Scaled(), (x,), rewrites=[ShareKV(2, method="mean")], tolerance=1e9, validate=False)
    assert fast.report.rewritten == 1
    with pytest.raises(OptionError, match="it computes something else: its outputs differ by"):
        standalone(fast, (x,))


class Encoder(nn.Module):
    """A model with methods beside its forward, as those of `transformers` have."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def test_methods_of_the_original_do_not_run_it_silently(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 5, 16), Encoder().eval()
    exact = attnopt.optimize(model, (x,), validate=False)
    assert_close(exact.generate(x), model(x))
    rewrite = Sparsify("window", window=2, sinks=0, always=True)
    fast = attnopt.optimize(model, (x,), rewrites=[rewrite], tolerance=1e9, validate=False)
    with pytest.raises(OptionError, match=r"knows nothing of sparsify: .* attnopt\.standalone"):
        fast.generate(x)
    with caplog.at_level("WARNING", logger="attnopt"):
        assert_close(fast.encode(x), model(x))
        fast.encode(x)
    assert [r.getMessage().count("without sparsify") for r in caplog.records if "encode" in r.getMessage()] == [1]
