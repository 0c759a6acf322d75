"""`PruneHeads` end to end, on small Hugging Face models with random weights and on a tiny attention."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import attnopt
from attnopt.errors import OptionError
from attnopt.rewrites import PruneHeads, Tolerance
from tests.passes.tiny import INNER, model, zeroed

# Large enough to accept whatever random weights do.
ANY = Tolerance(output=1e6)
_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}


def _bert() -> Any:
    return transformers.BertConfig(**_TEXT, num_attention_heads=4, max_position_embeddings=32)


def _gpt2() -> Any:
    return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, eos_token_id=1)


def _llama() -> Any:
    return transformers.LlamaConfig(**_TEXT, num_attention_heads=8, num_key_value_heads=2)


def _vit() -> Any:
    sizes = {"image_size": 16, "patch_size": 4, "intermediate_size": 48}
    return transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **sizes)


def _neox() -> Any:
    return transformers.GPTNeoXConfig(**_TEXT, num_attention_heads=4, rotary_pct=0.5, eos_token_id=1)


def _qwen3() -> Any:
    return transformers.Qwen3Config(**_TEXT, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def _made(config: Callable[[], Any]) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    made = transformers.AutoModel.from_config(config(), attn_implementation="sdpa").double().eval()
    if config is _vit:
        return made, {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 50, (2, 12))}
    return made, inputs if config is _bert else {**inputs, "use_cache": False}


# What stays of each changed parameter of the first layer when heads 0 and 2 go, and of the second when 0 to 3 do.
_SHAPES = {
    _bert: {
        "encoder.layer.0.attention.self.key.weight": (16, 32),
        "encoder.layer.0.attention.output.dense.weight": (32, 16),
    },
    _gpt2: {"h.0.attn.c_attn.weight": (32, 48), "h.0.attn.c_attn.bias": (48,), "h.0.attn.c_proj.weight": (16, 32)},
    _llama: {
        "layers.0.self_attn.q_proj.weight": (24, 32), "layers.0.self_attn.k_proj.weight": (8, 32),
        "layers.1.self_attn.q_proj.weight": (16, 32), "layers.1.self_attn.v_proj.weight": (4, 32),
        "layers.1.self_attn.o_proj.weight": (32, 16),
    },
    _vit: {"layers.0.attention.o_proj.weight": (32, 16)},
    _neox: {"layers.0.attention.query_key_value.weight": (48, 32), "layers.0.attention.query_key_value.bias": (48,)},
    _qwen3: {"layers.0.self_attn.q_proj.weight": (16, 32), "layers.0.self_attn.k_proj.weight": (16, 32)},
}  # fmt: skip


@pytest.mark.parametrize("config", list(_SHAPES), ids=lambda f: f.__name__)
def test_pruned_equals_zeroed_and_parameters_shrink(config: Callable[[], Any]) -> None:
    original, inputs = _made(config)
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    paths = [site.module_path for site in attnopt.explain(original, (), inputs).sites]
    wanted = {paths[0]: (0, 2), paths[1]: (0, 1, 2, 3) if config is _llama else (1,)}
    fast = attnopt.optimize(original, (), inputs, rewrites=[PruneHeads(heads=wanted)], tolerance=ANY)
    with torch.no_grad():
        expected, seen = zeroed(original, wanted, **inputs)(**inputs)[0], fast(**inputs)[0]
    # Models that cast their softmax to fp32 leave fp32's rounding in an fp64 run.
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-6)
    assert [site.status for site in fast.report.sites] == ["rewritten", "rewritten"], str(fast.report)
    assert all("prune_heads" in site.rewrites for site in fast.report.sites)
    figures = fast.report.figures["prune_heads"]
    assert figures["parameters before"] == sum(p.numel() for p in original.parameters())
    assert figures["parameters after"] == sum(p.numel() for p in fast.parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in fast.state_dict().items()}
    assert list(shapes) == list(state)
    assert _SHAPES[config].items() <= shapes.items()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} of the original changed"
    for name, parameter in fast.named_parameters():
        if parameter.shape == state[name].shape:
            assert parameter is original.get_parameter(name), f"{name} is no longer shared"


def test_key_heads_left_without_queries_go_and_the_map_may_be_irregular() -> None:
    original, inputs = _made(_llama)
    paths = [site.module_path for site in attnopt.explain(original, (), inputs).sites]
    rewrite = PruneHeads(heads={paths[0]: [0, 1, 5], 1: [4, 5, 6, 7]})
    fast = attnopt.optimize(original, (), inputs, rewrites=[rewrite], tolerance=ANY)
    first, second = (site.spec.heads for site in fast.report.sites)
    assert (first.q, first.k, first.k_map) == (5, 2, (0, 0, 1, 1, 1))
    assert (second.q, second.k) == (4, 1)


def _tiny(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    return model("concatenated", rotary=True, **options)


def test_heads_that_stay_are_bit_equal() -> None:
    """Dyadic inputs and weights make the projections exact, so that nothing depends on the order of their sums."""
    module, x = _tiny()
    x = torch.randint(-8, 8, x.shape).double()
    with torch.no_grad():
        module.qkv.weight.copy_(torch.randint(-8, 8, module.qkv.weight.shape) / 64)
        module.qkv.bias.copy_(torch.randint(-8, 8, module.qkv.bias.shape) / 64)
        module.o.weight.copy_(torch.eye(INNER))
        module.o.bias.zero_()
    options = {"kernel": "reference"}
    fast = attnopt.optimize(module, (x,), rewrites=[PruneHeads(heads={0: [1, 2]})], tolerance=ANY, options=options)
    whole = attnopt.optimize(module, (x,), options=options)
    kept = torch.tensor([*range(6), *range(18, INNER)])
    assert torch.equal(fast(x)[..., kept], whole(x)[..., kept])
    assert not fast(x)[..., 6:18].any()


def test_training_reaches_the_new_parameters_and_uses_the_same_ones_in_both_modes() -> None:
    module, x = _tiny(dropout=0.5)
    fast = attnopt.optimize(module, (x,), rewrites=[PruneHeads(heads={0: [1, 3]})], tolerance=ANY)
    before = fast(x)
    fast.train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    fast(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fast.parameters())
    assert fast.qkv.weight.shape == (INNER // 2 * 3, INNER)
    optimizer.step()
    assert fast.report.sites[0].spec is not None
    assert fast.report.sites[0].spec.dropout == 0.5
    assert not torch.allclose(fast.eval()(x), before)
    assert all(p.grad is None for p in module.parameters() if p.shape != fast.get_parameter("o.bias").shape)


def test_gradients_are_those_of_the_zeroed_model() -> None:
    module, x = _tiny()
    fast = attnopt.optimize(module, (x,), rewrites=[PruneHeads(heads={"": [1]})], tolerance=ANY)
    reference = zeroed(module, {"": (1,)}, x)
    fast(x).square().sum().backward()
    reference(x).square().sum().backward()
    keep = [row for row in range(3 * INNER) if row % INNER not in range(6, 12)]
    torch.testing.assert_close(fast.qkv.weight.grad, reference.qkv.weight.grad[keep], rtol=1e-9, atol=1e-9)


def test_state_dicts_copies_and_saved_modules() -> None:
    module, x = _tiny()
    rewrite = PruneHeads(heads={0: [2]})
    fast = attnopt.optimize(module, (x,), rewrites=[rewrite], tolerance=ANY)
    expected = fast(x)
    other = attnopt.optimize(_tiny()[0], (x,), rewrites=[rewrite], tolerance=ANY)
    with torch.no_grad():
        other.o.bias.add_(1)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), expected)
    copied = copy.deepcopy(fast)
    assert torch.equal(copied(x), expected)
    assert copied.qkv.weight is not fast.qkv.weight
    assert copied.report.sites[0].status == "rewritten"
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expected)
    assert loaded.report.figures["prune_heads"]["heads removed"] == 1


def test_other_sizes_run_where_shapes_are_dynamic() -> None:
    module, x = _tiny()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=16), 1: torch.export.Dim("positions", min=2, max=64)}}
    rewrite = PruneHeads(heads={0: [0, 3]})
    fast = attnopt.optimize(module, (x,), rewrites=[rewrite], tolerance=ANY, dynamic_shapes=shapes)
    longer = torch.randn(3, 9, INNER, dtype=torch.float64)
    torch.testing.assert_close(fast(longer), zeroed(module, {"": (0, 3)}, longer)(longer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", ["gradient", "ablation", "magnitude"])
def test_a_fraction_takes_the_least_important_heads(score: str) -> None:
    module, x = _tiny()
    with torch.no_grad():
        module.o.weight[:, 6:12] *= 1e-6
    rewrite = PruneHeads(fraction=0.25, score=score)
    fast = attnopt.optimize(module, (x,), rewrites=[rewrite], tolerance=Tolerance(output=1e-3, loss=1e-3))
    assert fast.report.sites[0].status == "rewritten"
    assert torch.equal(fast.o.weight, module.o.weight[:, [*range(6), *range(12, INNER)]])


def test_a_fraction_never_takes_all_heads_of_a_site_and_keeps_to_the_named_sites() -> None:
    original, inputs = _made(_bert)
    paths = [site.module_path for site in attnopt.explain(original, (), inputs).sites]
    rewrite = PruneHeads(fraction=0.9, score="magnitude", sites=[paths[1]])
    fast = attnopt.optimize(original, (), inputs, rewrites=[rewrite], tolerance=ANY)
    assert [site.status for site in fast.report.sites] == ["fused", "rewritten"]
    assert fast.report.sites[1].spec.heads.q == 1


@pytest.mark.parametrize("tolerance", [Tolerance(output=1e-9), Tolerance(loss=1e-12), 1e-9])
def test_the_tolerance_refuses(tolerance: Any) -> None:
    module, x = _tiny()
    fast = attnopt.optimize(module, (x,), rewrites=[PruneHeads(heads={0: [0]})], tolerance=tolerance)
    assert [site.status for site in fast.report.sites] == ["fused"]
    assert all(p is module.get_parameter(name) for name, p in fast.named_parameters())
    assert torch.allclose(fast(x), module(x), rtol=1e-9)
    assert any("refused" in note and "changed by" in note for note in fast.report.notes)
    assert fast.report.figures["prune_heads"]["output change"] > 1e-9


def test_calibration_inputs_and_the_users_loss_are_what_is_measured() -> None:
    module, x = _tiny()
    seen = []

    def loss(output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape)
        return output.abs().mean()

    other = [(torch.randn_like(x),)] * 2
    rewrite = PruneHeads(fraction=0.25, loss=loss)
    fast = attnopt.optimize(module, (x,), rewrites=[rewrite], tolerance=ANY, calibration=other)
    # Two batches each for importance, before and after.
    assert len(seen) == 6
    assert fast.report.figures["prune_heads"]["loss before"] == pytest.approx(module(other[0][0]).abs().mean().item())


def test_a_site_that_cannot_be_pruned_says_why_and_stays_fused() -> None:
    module, x = model("separate", norm="whole")
    fast = attnopt.optimize(module, (x,), rewrites=[PruneHeads(heads={0: [0]})], tolerance=ANY)
    assert fast.report.sites[0].status == "fused"
    assert any("share rows" in note for note in fast.report.notes)


def test_two_prunings_follow_one_another_and_both_are_in_the_report() -> None:
    module, x = _tiny()
    rewrites = [PruneHeads(heads={0: [3]}), PruneHeads(heads={0: [0]})]
    fast = attnopt.optimize(module, (x,), rewrites=rewrites, tolerance=ANY)
    torch.testing.assert_close(fast(x), zeroed(module, {"": (0, 3)}, x)(x), rtol=1e-12, atol=1e-12)
    assert fast.report.sites[0].rewrites.count("prune_heads") == 2
    assert {"prune_heads", "prune_heads #2"} <= set(fast.report.figures)
    fast.train()
    torch.testing.assert_close(fast(x), fast.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", ["gradient", "ablation", "magnitude"])
def test_where_no_site_can_be_pruned_every_score_says_why(score: str) -> None:
    module, x = model("separate")
    module.q.weight = module.k.weight  # type: ignore[union-attr]
    fast = attnopt.optimize(module, (x,), rewrites=[PruneHeads(fraction=0.5, score=score)], tolerance=1e6)
    assert fast.report.rewritten == 0
    assert "used in another place too" in " ".join(fast.report.notes)


def test_importance_that_is_no_number_prunes_nothing() -> None:
    module, x = model("separate")
    bad = x.clone()
    bad[0, 0] = torch.nan
    fast = attnopt.optimize(
        module, (x,), rewrites=[PruneHeads(fraction=0.5)], tolerance=1e6, calibration=[(bad,)]
    )  # fmt: skip
    assert fast.report.rewritten == 0
    assert "gradient of its heads is no finite number" in " ".join(fast.report.notes)


def test_a_fraction_of_no_head_is_said() -> None:
    module, x = model("separate")
    fast = attnopt.optimize(module, (x,), rewrites=[PruneHeads(fraction=0.01)], tolerance=1e6)
    assert fast.report.notes == ("prune_heads: nothing was changed, because no site or head was chosen.",)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda out: 1 / 0, "loss failed on an output of the model: ZeroDivisionError"),
        (lambda out: None, "loss must give one number, not None"),
        (lambda out: out, "take its mean"),
        (lambda out: out.detach().sum(), "needs a loss that has a gradient"),
        (lambda out: 1.0, "needs a loss that has a gradient"),
    ],
)
def test_losses_that_cannot_be_used_are_one_clear_error(loss: Any, said: str) -> None:
    module, x = model("separate")
    with pytest.raises(OptionError, match=said):
        attnopt.optimize(module, (x,), rewrites=[PruneHeads(fraction=0.5, loss=loss)], tolerance=1e6)
