"""`ShareKV` end to end, on small Hugging Face models with random weights and on a tiny attention."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import attnopt
from attnopt.rewrites import PruneHeads, ShareKV, Tolerance
from tests.passes.tiny import INNER, model

ANY = Tolerance(output=1e6)
_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
CONFIGS: dict[str, tuple[Any, int]] = {
    "bert": (lambda: transformers.BertConfig(**_TEXT, num_attention_heads=4, max_position_embeddings=32), 4),
    "gpt2": (
        lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, eos_token_id=1, bos_token_id=1
        ),
        4,
    ),
    "llama": (lambda: transformers.LlamaConfig(**_TEXT, num_attention_heads=8, num_key_value_heads=4), 4),
    "neox": (lambda: transformers.GPTNeoXConfig(**_TEXT, num_attention_heads=4, rotary_pct=0.5, eos_token_id=1), 4),
}


def _made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    made = transformers.AutoModel.from_config(CONFIGS[name][0](), attn_implementation="sdpa").double().eval()
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 50, (2, 12))}
    return made, inputs if name == "bert" else {**inputs, "use_cache": False}


def _run(module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return module(**inputs)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_alignment_alone_changes_nothing(name: str) -> None:
    """In fp64 at 1e-10, with every head moved and rotated."""
    original, inputs = _made(name)
    rewrite = ShareKV(2, method="aligned", merge=False)
    fast = attnopt.optimize(
        original, (), inputs, rewrites=[rewrite], tolerance=1e-10, calibration=[inputs], validate=False
    )
    figures = fast.report.figures["share_kv"]
    assert figures["sites"] == 2, str(fast.report)
    assert figures["output change"] < 1e-10
    assert figures["KV numbers a token before"] == figures["KV numbers a token after"]
    changed = [n for n, p in fast.named_parameters() if not torch.equal(p, original.get_parameter(n))]
    assert len(changed) >= 4
    # The kernel and eager attention sum in different orders; models that cast to fp32 leave fp32's rounding.
    torch.testing.assert_close(_run(fast, inputs), _run(original, inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", ["mean", "aligned"])
def test_projections_and_cache_shrink(name: str, method: str) -> None:
    original, inputs = _made(name)
    heads = CONFIGS[name][1]
    state = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    fast = attnopt.optimize(
        original, (), inputs, rewrites=[ShareKV(2, method=method)], tolerance=ANY, calibration=[inputs], validate=False
    )
    assert [site.status for site in fast.report.sites] == ["rewritten", "rewritten"], str(fast.report)
    assert all(site.spec.heads.k == site.spec.heads.v == 2 for site in fast.report.sites)
    figures = fast.report.figures["share_kv"]
    assert figures["KV numbers a token after"] * heads == figures["KV numbers a token before"] * 2
    assert figures["parameters after"] == sum(p.numel() for p in fast.parameters()) < figures["parameters before"]
    assert torch.isfinite(_run(fast, inputs)).all()
    for key, tensor in original.state_dict().items():
        assert torch.equal(tensor, state[key]), f"{key} of the original changed"


def _tiny(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    return model("separate", rotary=True, **options)


def test_mean_is_the_mean_of_neighbours() -> None:
    module, x = _tiny()
    fast = attnopt.optimize(module, (x,), rewrites=[ShareKV(2, method="mean")], tolerance=ANY)
    for name in ("k", "v"):
        for kind in ("weight", "bias"):
            old = module.get_parameter(f"{name}.{kind}").unflatten(0, (2, 2, 6)).mean(1).flatten(0, 1)
            torch.testing.assert_close(fast.get_parameter(f"{name}.{kind}"), nn.Parameter(old), rtol=1e-14, atol=1e-14)
    assert fast.q.weight is module.q.weight
    assert fast.o.weight is module.o.weight


def test_aligned_is_closer_than_mean_where_heads_are_alike_up_to_order() -> None:
    module, x = _tiny()
    with torch.no_grad():
        for p in (module.k, module.v):
            p.weight[12:] = p.weight[:12].roll(6, 0)
            p.bias[12:] = p.bias[:12].roll(6, 0)
    changes = {}
    for method in ("mean", "aligned"):
        fast = attnopt.optimize(module, (x,), rewrites=[ShareKV(2, method=method)], tolerance=ANY, calibration=[(x,)])
        changes[method] = fast.report.figures["share_kv"]["output change"]
    assert changes["aligned"] < 1e-10 < 0.01 < changes["mean"]


def test_a_change_outside_the_tolerance_is_refused() -> None:
    module, x = _tiny()
    fast = attnopt.optimize(module, (x,), rewrites=[ShareKV(2, method="mean")], tolerance=1e-3)
    assert fast.report.sites[0].status == "fused"
    assert any("share_kv: refused, because the output changed by" in note for note in fast.report.notes)
    torch.testing.assert_close(fast(x), module(x))
    assert fast.k.weight is module.k.weight


def test_trained_saved_and_loaded() -> None:
    module, x = _tiny()
    rewrites = [ShareKV(2, method="aligned")]
    fast = attnopt.optimize(module, (x,), rewrites=rewrites, tolerance=ANY, calibration=[(x,)])
    fast.train()
    fast(x).square().mean().backward()
    assert fast.k.weight.grad is not None
    assert fast.k.weight.grad.shape == (12, INNER)
    with torch.no_grad():
        for p in fast.parameters():
            p -= 0.1 * p.grad
    fast.eval()
    expected = fast(x)
    held = io.BytesIO()
    torch.save(fast, held)
    held.seek(0)
    torch.testing.assert_close(torch.load(held, weights_only=False)(x), expected)
    again = attnopt.optimize(module, (x,), rewrites=rewrites, tolerance=ANY, calibration=[(x,)])
    again.load_state_dict(fast.state_dict())
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(copy.deepcopy(fast)(x), expected)


def test_after_pruning_heads_are_shared_as_they_are_left() -> None:
    module, x = _tiny()
    rewrites = [PruneHeads(heads={0: [1, 3]}), ShareKV(1, method="aligned")]
    fast = attnopt.optimize(module, (x,), rewrites=rewrites, tolerance=ANY, calibration=[(x,)])
    (site,) = fast.report.sites
    assert (site.spec.heads.q, site.spec.heads.k) == (2, 1)
    assert site.rewrites[:2] == ("prune_heads", "share_kv")
    assert fast.k.weight.shape == (6, INNER)


def test_sites_by_pattern_and_by_a_mapping() -> None:
    original, inputs = _made("llama")
    paths = [site.module_path for site in attnopt.explain(original, (), inputs).sites]
    for kv, sites in ((2, ["layers.1.*"]), ({paths[1]: 2}, None)):
        rewrite = ShareKV(kv, method="mean", sites=sites)
        fast = attnopt.optimize(original, (), inputs, rewrites=[rewrite], tolerance=ANY, validate=False)
        assert [site.spec.heads.k for site in fast.report.sites] == [4, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kv_heads": 0}, "positive number"),
        ({"kv_heads": True}, "positive number"),
        ({"kv_heads": {}}, "positive number"),
        ({"kv_heads": {"a": "b"}}, "positive number"),
        ({"kv_heads": 2, "method": "median"}, "choose one of aligned, mean"),
        ({"kv_heads": {"a": 2}, "sites": ["a"]}, "sites="),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(attnopt.errors.OptionError, match=says):
        ShareKV(**arguments)


@pytest.mark.parametrize(
    ("rewrite", "calibration", "says"),
    [
        (ShareKV(3, method="mean"), None, "has 4 key-value heads, which 3 does not divide"),
        (ShareKV(2), None, "saw none: pass calibration="),
        (ShareKV(2, method="mean", sites=["nowhere"]), None, "there is no attention site 'nowhere'"),
        (ShareKV(2, method="mean", sites="nowhere"), None, "write \\['nowhere'\\]"),
        (ShareKV({7: 2}, method="mean"), None, "there is no attention site 7"),
    ],
)
def test_requests_that_do_not_fit_the_model(rewrite: ShareKV, calibration: Any, says: str) -> None:
    module, x = _tiny()
    with pytest.raises(attnopt.errors.OptionError, match=says):
        attnopt.optimize(module, (x,), rewrites=[rewrite], tolerance=ANY, calibration=calibration)


def _declined(module: nn.Module, x: torch.Tensor, kv: int = 2) -> str:
    fast = attnopt.optimize(module, (x,), rewrites=[ShareKV(kv, method="mean")], tolerance=ANY)
    assert fast.report.rewritten == 0
    assert all(p is q for p, q in zip(fast.parameters(), module.parameters(), strict=True))
    torch.testing.assert_close(fast(x), module(x))
    return " ".join(fast.report.notes)


def test_sites_that_do_not_fit_are_declined_with_the_reason() -> None:
    assert "it has 4 key-value heads already" in _declined(*_tiny(), kv=4)
    assert "4 key-value heads already" in _declined(*_tiny(), kv=8)
    module, x = _tiny()
    module.v.weight = module.k.weight
    assert "the key projection's parameters are used in another place too" in _declined(module, x)
    assert "share rows" in _declined(*model("separate", norm="whole"))
    assert "it has 1 key-value heads already" in _declined(*model("shared-kv"))


def test_quantised_projections_are_declined() -> None:
    class Quantised(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach()
            self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
            self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
            self.bias = linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight * self.scale, self.bias)

    module, x = _tiny()
    module.k = Quantised(module.k)
    assert "key projection's weight is computed, no parameter" in _declined(module, x)


def test_heads_made_by_an_open_size_are_shared_or_declined() -> None:
    class Open(nn.Module):
        """Six heads over three key-value heads, whose width no view of the graph says."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(24, 24), nn.Linear(24, 24)
            self.k, self.v = nn.Linear(24, 12), nn.Linear(24, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """[batch, positions, 24] to the same."""
            q = self.q(x).unflatten(-1, (6, -1)).transpose(1, 2)
            made = (m(x).unflatten(-1, (3, -1)).transpose(1, 2) for m in (self.k, self.v))
            k, v = (t.repeat_interleave(2, 1) for t in made)
            out = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
            return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    module, x = Open().double().eval(), torch.randn(2, 5, 24, dtype=torch.float64)
    shapes = {"x": {0: torch.export.Dim("b", min=1, max=8), 1: torch.export.Dim("n", min=2, max=64)}}
    fast = attnopt.optimize(
        module, (x,), rewrites=[ShareKV(1, method="mean")], tolerance=1e6, dynamic_shapes=shapes, validate=False
    )
    left = [n for n in fast.report.notes if "share_kv" in n and "was left as it is" in n]
    assert (len(left), tuple(fast.k.weight.shape)) in [(1, (12, 24)), (0, (4, 24))]
    if left:
        torch.testing.assert_close(fast(x), module(x))
