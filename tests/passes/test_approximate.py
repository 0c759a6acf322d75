"""Stages, decisions, and what is kept when a rewrite is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.errors import CaptureError, OptionError
from attnopt.passes.approximate import Decision, repeat, rewrite
from attnopt.passes.prune_heads import PruneHeads
from attnopt.passes.tolerance import Calibration, Tolerance
from tests.passes.tiny import INNER, captured, model, output, stage

ANY = Tolerance(output=1e6)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (model("separate")[0] for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def _two() -> tuple[nn.Module, torch.Tensor]:
    return _Two(), torch.randn(2, 5, INNER, dtype=torch.float64)


def test_sites_are_found_by_path_and_by_number() -> None:
    at = stage(*_two())
    assert at.paths == ["first", "second"]
    assert at.key(1, "x") == at.key("second", "x") == "second"
    for wrong in (2, -1, True, "third", None):
        with pytest.raises(OptionError, match="the 2 sites are first, second"):
            at.key(wrong, "x")  # type: ignore[arg-type]


def test_a_module_used_twice_gives_two_keys() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = model("separate")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x))

    at = stage(Twice(), torch.randn(2, 5, INNER, dtype=torch.float64))
    assert at.paths[0] == "inner"
    assert len(set(at.paths)) == 2


def test_rewrites_follow_one_another_and_a_refused_one_leaves_no_trace() -> None:
    module, x = _two()
    at = stage(module, x)
    rewrites = [PruneHeads(heads={"first": [0]}), PruneHeads(heads={"first": [2]}), PruneHeads(heads={"second": [1]})]
    done = rewrite(at.gm, rewrites, at.calibration, at.tensors, {}, ANY)
    assert [d.figures["parameters before"] - d.figures["parameters after"] for d in done.decisions] == [594, 1188, 1782]
    assert done.tensors["first.o.weight"].shape == (INNER, INNER // 2)
    refused = rewrite(at.gm, rewrites, at.calibration, at.tensors, {}, Tolerance(output=1e-12))
    assert refused.gm is at.gm
    assert all(refused.tensors[name] is tensor for name, tensor in at.tensors.items())
    assert all(d.refused and not d.cuts and not d.sites for d in refused.decisions)
    assert "refused, because the output changed by" in refused.decisions[0].notes()[0]


def test_another_capture_is_rewritten_in_the_same_way() -> None:
    module, x = _two()
    at = stage(module, x)
    rewrites = [PruneHeads(heads={"first": [0]}), PruneHeads(heads={"first": [1]})]
    done = rewrite(at.gm, rewrites, at.calibration, at.tensors, {}, ANY)
    again = captured(module, x)
    gm = repeat(again.gm, rewrites, done.decisions, Calibration(again.states, (), again.out_spec), {}, {}).gm
    first, second = stage(module, x), stage(module, x)
    first.gm, first.tensors, second.gm, second.tensors = done.gm, dict(done.tensors), gm, dict(done.tensors)
    assert torch.equal(output(first), output(second))


def test_a_capture_that_does_not_fit_the_decision_is_an_error() -> None:
    module, x = _two()
    again = captured(module, x)
    decision = Decision("prune_heads", (("third", (0,)),))
    blank = Calibration(again.states, (), again.out_spec)
    with pytest.raises(CaptureError, match="third: the site is not recognised"):
        repeat(again.gm, [PruneHeads(heads={0: [0]})], [decision], blank, {}, {})


def test_tied_parameters_are_left_alone() -> None:
    module, x = _two()
    module.other = module.first.o
    at = stage(module, x)
    done = rewrite(at.gm, [PruneHeads(heads={"first": [0]})], at.calibration, at.tensors, {}, ANY)
    ((site, why),) = done.decisions[0].declines
    assert site == "first"
    assert "under several names" in why
