"""Small Hugging Face models: every site found and fused, with the expected spec, and the same answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim

import attnopt
from attnopt import dynamo

transformers = pytest.importorskip("transformers")
LLAMA = "4/2 heads, d=8; score 0.353553*s; keep k <= q and mask[b, k] (empty row: {})"
CAUSAL = "4 heads, d=8; score 0.353553*s; keep k <= q (empty row: uniform)"


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(length))


def _mask(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return mask


def _decoder(batch: int = 2, length: int = 12) -> dict[str, Any]:
    return {"input_ids": _ids(batch, length), "attention_mask": _mask(batch, length), "use_cache": False}


_WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL = {**_WIDTHS, "vocab_size": 100}
MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]], int]] = {
    "llama": ("LlamaConfig", "AutoModelForCausalLM", {**_SMALL, "num_key_value_heads": 2}, _decoder, 2),
    "gpt2": ("GPT2Config", "AutoModelForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}, lambda: {"input_ids": _ids(2, 12), "use_cache": False}, 2),
    "bert": ("BertConfig", "AutoModel", _SMALL, lambda: {"input_ids": _ids(2, 12), "attention_mask": _mask(2, 12)}, 2),
    "t5": ("T5Config", "AutoModelForSeq2SeqLM", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}, lambda: {**_decoder(), "decoder_input_ids": _ids(2, 7)}, 6),
    "swin": ("SwinConfig", "AutoModel", {"image_size": 56, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7}, lambda: {"pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))}, 4),
    "gemma2": ("Gemma2Config", "AutoModelForCausalLM", {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}, _decoder, 2),
    "vit": ("ViTConfig", "AutoModel", {**_WIDTHS, "image_size": 32, "patch_size": 8}, lambda: {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}, 2),
}  # fmt: skip
# Specs of the first site under eager attention.
SPECS = {
    "llama": LLAMA.format("uniform"),
    # Positions that count up hold one sequence: nothing is left of the mask of packed ones.
    "gpt2": CAUSAL,
    "bert": "4 heads, d=8; score 0.353553*s; keep mask[b, k] (empty row: uniform)",
    "vit": "4 heads, d=8; score 0.353553*s",
}


def _model(name: str, attention: str) -> Any:
    config, kind, settings, _, _ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, kind).from_config(
        getattr(transformers, config)(**settings), attn_implementation=attention
    )
    return made.eval()


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _close(model: Any, run: Callable[..., Any], inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        eager, fast = model(**inputs), run(**inputs)
        golden = copy.deepcopy(model).double()(**_double(inputs))
    assert type(fast) is type(eager)
    # In fp64 a row that sees padding only may sum two minima to -inf; such rows must still agree with eager.
    usable = golden[0].isfinite()
    torch.testing.assert_close(fast[0][~usable], eager[0][~usable], rtol=1e-4, atol=1e-4, equal_nan=True)
    g, e, f = golden[0][usable], eager[0][usable], fast[0][usable]
    # A whole model has rounding of its own beside attention's: twice eager's error, and a few ulp of the output.
    assert _rms(f - g) <= 2 * _rms(e - g) + 4 * torch.finfo(torch.float32).eps * _rms(g)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_fused(name: str, attention: str) -> None:
    if attention == "sdpa" and name in ("t5", "gemma2"):
        attention = "eager"  # Neither of them runs its own attention by sdpa.
    model, inputs, sites = _model(name, attention), MODELS[name][3](), MODELS[name][4]
    with torch.no_grad():
        fast = attnopt.optimize(model, (), inputs, strict=True)
    assert [s.status for s in fast.report.sites] == ["fused"] * sites
    if attention == "eager" and name in SPECS:
        assert str(fast.report.sites[0].spec) == SPECS[name]
    _close(model, fast, inputs)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_backend_fuses_them_too(name: str) -> None:
    model, inputs, sites = _model(name, "eager"), MODELS[name][3](), MODELS[name][4]
    torch._dynamo.reset()
    dynamo.reports.clear()
    _close(model, torch.compile(model, backend=dynamo.attnopt_backend, options={"rest": "eager"}), inputs)
    assert sum(r.fused for r in dynamo.reports) == sites


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_batch_and_length_may_vary(name: str) -> None:
    model, inputs, sites = _model(name, "eager"), MODELS[name][3](), MODELS[name][4]
    sizes = {0: Dim("B", min=1, max=64), 1: Dim("S", min=2, max=64)}
    shapes = {n: sizes if isinstance(x, torch.Tensor) else None for n, x in inputs.items()}
    with torch.no_grad():
        fast = attnopt.optimize(model, (), inputs, dynamic_shapes=shapes, strict=True)
    assert fast.report.fused == sites
    _close(model, fast, {**inputs, "input_ids": _ids(3, 9), "attention_mask": _mask(3, 9)})


@pytest.mark.parametrize("name", ["LED", "Whisper"])
def test_what_export_refuses_goes_by_dynamo(name: str) -> None:
    shared = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    shared.update({"d_model": 32, "vocab_size": 100})
    inputs: dict[str, Any]
    if name == "LED":
        shared.update(
            {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
        )
        inputs = {"input_ids": _ids(1, 16), "decoder_input_ids": _ids(1, 8)}
    else:
        shared.update(
            {
                "max_source_positions": 20,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            }
        )
        inputs = {
            "input_features": torch.randn(1, 80, 40, generator=torch.Generator().manual_seed(1)),
            "decoder_input_ids": _ids(1, 8),
        }
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shared)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config).eval()
    fast = attnopt.optimize(model, (), inputs)
    assert "captured by Dynamo" in fast.report.notes[0]
    assert fast.report.fused == (3 if name == "LED" else fast.report.fused) >= 2
    _close(model, fast, inputs)


def test_sliding_chunks_are_a_window() -> None:
    """Longformer's attention with padding at the end of one row: outputs and gradients."""
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**_SMALL, attention_window=[4, 4])
    model = longformer.LongformerSelfAttention(config, 0).eval()
    x = torch.randn(2, 12, 32)
    mask = torch.zeros(2, 12)
    mask[1, 7:] = torch.finfo(torch.float32).min
    inputs = {"attention_mask": mask, "is_index_masked": mask < 0, "is_global_attn": False}
    fast = attnopt.optimize(model, (x,), inputs, strict=True, validate=False, options={"kernel": "reference"})
    spec = "4 heads, d=8; score s + where(bias[b, k] == 0, 0, -3.40282e+38); keep k <= q + 2 and q <= k + 2 (empty row: nan); gate where(mask[b, q], 0, 1)"
    assert [str(site.spec) for site in fast.report.sites] == [spec]
    results = []
    for run in (model, fast):
        (out,) = run(x, **inputs)
        wanted = [model.query.weight, model.key.weight, model.value.weight]
        results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), wanted)])
    for expected, found in zip(*results, strict=True):
        # Sums of up to 24 rows of 32 features in fp32, in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
