"""`OptimizedModule` behaves as the module that it stands for."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import attnopt
from attnopt.module import OptimizedModule, full_size
from tests.modules import SelfAttention

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> SelfAttention:
    torch.manual_seed(1)
    return SelfAttention(0.25).eval()


@pytest.fixture
def fast(model: SelfAttention) -> OptimizedModule:
    return attnopt.optimize(model, (X,))


def test_parameters_are_the_originals(model: SelfAttention, fast: OptimizedModule) -> None:
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert full_size(fast) is fast._source


def test_a_changed_parameter_is_seen_at_the_next_call(model: SelfAttention, fast: OptimizedModule) -> None:
    with torch.no_grad():
        model.out.bias.add_(1)
    torch.testing.assert_close(fast(X), model(X))
    fast.load_state_dict({n: torch.randn_like(p) for n, p in model.state_dict().items()})
    torch.testing.assert_close(fast(X), model(X))


def test_replaced_parameters_are_seen(model: SelfAttention, fast: OptimizedModule) -> None:
    fast.out.weight = torch.nn.Parameter(torch.zeros(16, 16))
    torch.testing.assert_close(fast(X), model.out.bias.expand(2, 5, 16))
    assert model.out.weight.abs().sum() > 0


def test_train_and_eval_are_captured_apart(model: SelfAttention, fast: OptimizedModule) -> None:
    assert fast.report.fused == 1
    fast.train()
    assert not model.training
    torch.manual_seed(3)
    trained = fast(X)
    (site,) = fast.report.sites
    assert site.spec is not None
    assert site.spec.dropout > 0
    torch.manual_seed(3)
    assert torch.equal(fast(X), trained)
    assert not torch.allclose(fast(X), trained)
    torch.testing.assert_close(fast.eval()(X), model(X))


def test_saved_and_loaded(model: SelfAttention, fast: OptimizedModule) -> None:
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert not loaded.training
    torch.testing.assert_close(loaded(X), model(X))
    assert loaded.report.fused == 1


def test_a_deep_copy_is_apart(model: SelfAttention, fast: OptimizedModule) -> None:
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        twin.out.bias.add_(1)
    torch.testing.assert_close(twin(X), model(X) + 1)
    torch.testing.assert_close(fast(X), model(X))


def test_a_cast_module_asks_for_cast_inputs_or_captures_again(model: SelfAttention) -> None:
    fast = attnopt.optimize(copy.deepcopy(model))
    fast.to(torch.float64)
    torch.testing.assert_close(fast(X.double()), model.double()(X.double()))


def test_a_module_cast_after_capture_gives_a_clear_error_or_the_right_result(
    model: SelfAttention, fast: OptimizedModule
) -> None:
    fast.to(torch.float64)
    with pytest.raises(attnopt.AttnoptError, match=r"float64|float32"):
        fast(X.double())


def test_attributes_of_the_original_are_found(fast: OptimizedModule) -> None:
    assert fast.qkv.in_features == 16
    assert fast.dropout.p == 0.25
    with pytest.raises(AttributeError):
        _ = fast.nothing


def test_children_and_hooks(model: SelfAttention, fast: OptimizedModule) -> None:
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    seen = []
    fast.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fast(X)
    assert seen == [(2, 5, 16)]


def test_a_graph_made_under_autocast_is_not_used_without_it(model: SelfAttention) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        fast = attnopt.optimize(model, (X,), validate=False)
    assert fast(X).dtype == model(X).dtype == torch.float32


def test_parameters_of_two_parts_may_be_one() -> None:
    """Their names are the same; it is the parts that differ."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    x = torch.randn(2, 8)
    fast = attnopt.optimize(model, (x,))
    torch.testing.assert_close(fast(x), model(x))
