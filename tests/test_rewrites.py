"""What a user may name in `rewrites=`, and what misuse gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt.errors import CaptureError, OptionError
from attnopt.rewrites import MixHeads, PruneHeads, ShareKV, Tolerance
from tests.passes.tiny import model

# Large enough to accept whatever random weights do.
ANY = Tolerance(output=1e6)


def _tiny() -> tuple[nn.Module, torch.Tensor]:
    return model("concatenated", rotary=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs either heads"),
        ({"heads": {0: [1]}, "fraction": 0.5}, "needs either heads"),
        ({"fraction": 1.5}, "between 0 and 1"),
        ({"fraction": True}, "between 0 and 1"),
        ({"fraction": 0.5, "score": "luck"}, "choose one of gradient, ablation, magnitude"),
        ({"heads": [1, 2]}, "must map module paths"),
        ({"heads": {0: [1]}, "sites": [0]}, "only with fraction"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        PruneHeads(**arguments)


@pytest.mark.parametrize(
    ("rewrite", "said"),
    [
        (PruneHeads(heads={"nowhere": [0]}), "no attention site 'nowhere'; the 1 sites are"),
        (PruneHeads(heads={3: [0]}), "no attention site 3"),
        (PruneHeads(heads={0: [4]}), "no head 4; its heads are 0 to 3"),
        (PruneHeads(heads={0: [0, 1, 2, 3]}), "at least one must stay"),
        (PruneHeads(heads={0: "12"}), "must be a sequence of numbers"),
        (PruneHeads(fraction=0.5, sites=["nowhere"]), "no attention site 'nowhere'"),
    ],
)
def test_sites_and_heads_that_are_not_there(rewrite: PruneHeads, said: str) -> None:
    module, x = _tiny()
    with pytest.raises(OptionError, match=said):
        attnopt.optimize(module, (x,), rewrites=[rewrite], tolerance=ANY)


def test_an_approximate_rewrite_needs_a_tolerance_and_an_instance() -> None:
    module, x = _tiny()
    with pytest.raises(OptionError, match="needs a tolerance"):
        attnopt.optimize(module, (x,), rewrites=[PruneHeads(fraction=0.5)])
    with pytest.raises(OptionError, match=r"objects from attnopt\.rewrites"):
        attnopt.optimize(module, (x,), rewrites=[PruneHeads], tolerance=ANY)


def test_losses_and_rewrites_that_are_none_get_one_error() -> None:
    module, x = _tiny()
    for rewrites, said in (
        (PruneHeads(heads={0: [1]}), r"write rewrites=\[PruneHeads"),
        ([PruneHeads(heads={0: [1]}, loss="kl")], "prune_heads: loss must be a function"),  # type: ignore[arg-type]
        ([PruneHeads(heads={0: [1]}, loss=lambda out: out)], r"must give one number, not a tensor \[2, 5, 24\]"),
    ):
        with pytest.raises(OptionError, match=said):
            attnopt.optimize(module, (x,), rewrites=rewrites, tolerance=ANY)  # type: ignore[arg-type]


class Around(nn.Module):
    """A model with another one inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[..., :24]


def test_a_result_of_approximate_rewrites_is_no_start_for_others() -> None:
    module, x = _tiny()
    given = [PruneHeads(heads={0: [1]})]
    pruned = attnopt.optimize(module, (x,), rewrites=given, tolerance=ANY)
    mixed = attnopt.optimize(module, (x,), rewrites=[MixHeads(1, 1, always=True)], tolerance=ANY, calibration=[(x,)])
    with pytest.raises(OptionError, match=r"\(prune_heads\).*with all rewrites in one call"):
        attnopt.optimize(pruned, (x,), rewrites=given, tolerance=ANY)
    with pytest.raises(OptionError, match=r"^model is .*\(mix_heads\).*with all rewrites in one call"):
        attnopt.optimize(mixed, (x,))
    with pytest.raises(OptionError, match=r"^inner is .*\(prune_heads\).*with all rewrites in one call"):
        attnopt.explain(Around(pruned), (x,))


@pytest.mark.filterwarnings("ignore")
def test_packed_quantised_weights_are_one_clear_error() -> None:
    module, x = model("separate")
    packed = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    for rewrite in (ShareKV(1, method="mean"), PruneHeads(heads={0: [1]})):
        with pytest.raises(CaptureError, match="the quantised weights of q are packed: rewrite the model before"):
            attnopt.optimize(packed, (x,), rewrites=[rewrite], tolerance=ANY)


def test_an_exact_result_is_a_start_like_the_model_before() -> None:
    module, x = _tiny()
    exact = attnopt.optimize(module, (x,), validate=False)
    again = attnopt.optimize(exact, (x,), rewrites=[PruneHeads(heads={0: [1]})], tolerance=ANY, validate=False)
    assert again.report.rewritten == 1
    assert len(attnopt.explain(exact, (x,)).sites) == 1
    outer = attnopt.optimize(Around(attnopt.optimize(module)), (x,), validate=False)
    assert [site.module_path for site in outer.report.sites] == ["inner"]
    with torch.no_grad():
        torch.testing.assert_close(outer(x), module(x)[..., :24])


def test_rewrites_of_later_versions_say_so() -> None:
    with pytest.raises(AttributeError, match="not available in this version"):
        _ = attnopt.rewrites.Auto
    with pytest.raises(AttributeError, match="no attribute 'Prune'"):
        _ = attnopt.rewrites.Prune


def test_rewrites_run_in_one_order_whatever_order_they_are_given_in() -> None:
    module, x = model("separate")
    given = [ShareKV(1, method="mean"), PruneHeads(heads={0: [1, 3]})]
    for rewrites in (given, given[::-1]):
        fast = attnopt.optimize(module, (x,), rewrites=rewrites, tolerance=1e6)
        assert fast.report.sites[0].rewrites[:2] == ("prune_heads", "share_kv")
        assert fast.k.weight.shape == (6, 24)
