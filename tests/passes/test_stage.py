"""Sites that get another spec, tensors that a rewrite brings along, and what a site is given."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sympy as sp
import torch
from torch import nn
from torch.testing import assert_close

import attnopt
from attnopt import expr as ex
from attnopt.errors import OptionError
from attnopt.passes.approximate import Decision
from attnopt.passes.base import APPROX
from attnopt.passes.stage import Seen, Stage
from attnopt.region import Operand
from attnopt.rewrites import PruneHeads, Tolerance
from attnopt.runtime.reference import reference
from attnopt.spec import Capture
from tests.passes.tiny import HEADS, INNER, WIDTH, model, output, stage

ANY = Tolerance(output=1e6)


@dataclass(frozen=True)
class Window:
    """A toy rewrite: the last two keys only, and a learned gain of each head's scores."""

    gain: bool = False
    loss: Any = None
    name: str = field(default="window", init=False)
    contract: Any = field(default=APPROX, init=False)

    def decide(self, stage: Stage) -> Decision:
        return Decision(self.name, tuple((key, ()) for key in stage.regions))

    def apply(self, stage: Stage, decision: Decision) -> dict[str, str]:
        for key, _ in decision.sites:
            region = stage.regions[key]
            spec = replace(region.spec, keep=sp.And(region.spec.keep, ex.k <= ex.q, ex.q <= ex.k + 1))
            captures = dict(region.captures)
            if self.gain:
                node = stage.add(key, "gain", lambda: nn.Parameter(torch.full((HEADS,), 2.0, dtype=torch.float64)))
                captures["gain"] = Operand(node, ("i0",))
                spec = replace(
                    spec, score=spec.score * ex.load("gain", ex.h), captures=(Capture("gain", "float", (HEADS,)),)
                )
            assert stage.put(key, region.replace(spec=spec.canonical(), captures=captures), self.name) is None
        return {}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (model("separate")[0] for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def _by_hand(layer: Any, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    q, k, v = layer.heads(x)
    place = torch.arange(x.shape[1])
    near = (place <= place[:, None]) & (place[:, None] <= place + 1)
    scores = gain * (q @ k.mT) / WIDTH**0.5
    return layer.o((scores.masked_fill(~near, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_site_computes_its_new_spec_and_is_read_back() -> None:
    module, x = model("separate")
    at = stage(module, x)
    before = output(at)
    Window().apply(at, Window().decide(at))
    at.finish()
    assert_close(output(at), _by_hand(module, x), atol=1e-12, rtol=0)
    assert not torch.allclose(before, output(at))
    again = Stage(at.gm, at.calibration, at.tensors, {})
    assert again.paths == at.paths
    (region,) = again.regions.values()
    assert region.pattern == "attnopt"
    assert ex.canon(region.spec.keep) == ex.canon(sp.And(ex.k <= ex.q, ex.q <= ex.k + 1))


def test_the_whole_way_with_a_parameter_of_its_own() -> None:
    module, x = Two().eval(), torch.randn(2, 5, INNER, dtype=torch.float64)
    source = copy.deepcopy(module.state_dict())
    fast = attnopt.optimize(module, (x,), rewrites=[Window(gain=True)], tolerance=ANY)
    assert [s.status for s in fast.report.sites] == ["rewritten"] * 2
    assert [s.rewrites for s in fast.report.sites] == [("window",)] * 2
    want = _by_hand(module.second, _by_hand(module.first, x, 2.0), 2.0)
    assert_close(fast(x), want, atol=1e-12, rtol=0)
    assert set(fast.state_dict()) - set(source) == {"attnopt.first.gain", "attnopt.second.gain"}
    assert all(torch.equal(module.state_dict()[name], held) for name, held in source.items())
    assert set(module.state_dict()) == set(source)
    # It trains, and another capture (training mode) takes the tensors that are there.
    fast.train()
    fast(x).square().sum().backward()
    gain = fast.get_parameter("attnopt.first.gain")
    assert gain.grad is not None
    assert gain.grad.abs().min() > 0
    with torch.no_grad():
        gain.fill_(1.0)
    want = _by_hand(module.second, _by_hand(module.first, x, 1.0), 2.0)
    assert_close(fast(x), want, atol=1e-12, rtol=0)
    assert_close(copy.deepcopy(fast).eval()(x), want, atol=1e-12, rtol=0)


def test_rewrites_compose_and_a_refused_one_takes_its_tensors_along() -> None:
    module, x = model("separate")
    pruned = attnopt.optimize(module, (x,), rewrites=[PruneHeads(heads={0: [1]}), Window()], tolerance=ANY)
    (site,) = pruned.report.sites
    assert site.rewrites == ("prune_heads", "window")
    assert site.spec is not None
    assert site.spec.heads.q == HEADS - 1
    refused = attnopt.optimize(module, (x,), rewrites=[Window(gain=True)], tolerance=Tolerance(output=1e-9))
    assert [s.status for s in refused.report.sites] == ["fused"]
    assert set(refused.state_dict()) == set(module.state_dict())
    assert_close(refused(x), module(x), atol=1e-12, rtol=0)


def test_what_a_site_is_given() -> None:
    module, x = Two().eval(), torch.randn(2, 5, INNER, dtype=torch.float64)
    at = stage(module, x)
    seen: dict[str, Seen] = {}
    at.visit(seen.__setitem__)
    assert list(seen) == ["first", "second"]
    given = seen["first"]
    for got, want in zip((given.q, given.k, given.v), module.first.heads(x), strict=True):
        assert_close(got, want, atol=0, rtol=0)
    out, _ = reference(given.spec, given.q, given.k, given.v, given.captures, given.scalars)
    assert_close(module.first.o(out.transpose(1, 2).flatten(2)), module.first(x), atol=1e-12, rtol=0)
    assert all("attnopt" not in str(n.target) for n in at.gm.graph.nodes), "looking changes nothing"


def test_sites_are_chosen_by_name_pattern_number_and_function() -> None:
    module, x = model("separate")
    at = stage(nn.Sequential(module, module.__class__("separate").double().eval()), x)
    assert at.paths == ["0", "1"]
    assert at.choose(None, "r") == at.choose(["*"], "r") == at.choose([1, "0"], "r") == ["0", "1"]
    assert at.choose(["1"], "r") == at.choose([1], "r") == at.choose(["[1-9]"], "r") == ["1"]
    assert at.choose(lambda path, spec: path == "1" and spec.heads.q == HEADS, "r") == ["1"]
    with pytest.raises(OptionError, match="r: there is no attention site 'x\\*'; the 2 sites are 0, 1"):
        at.choose(["x*"], "r")
    for given in (1, "0", 2.5):
        with pytest.raises(OptionError, match=f"write \\[{given!r}\\]"):
            at.choose(given, "r")  # type: ignore[arg-type]


class Alike(nn.Module):
    """Sites whose names differ in a dot only: `a.b` and `a_b`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.b, self.a_b = (model("separate")[0] for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, positions, features] to the same."""
        return self.a_b(x + self.a.b(x))  # type: ignore[no-any-return, operator]


def test_sites_of_like_names_have_tensors_of_their_own() -> None:
    fast = attnopt.optimize(
        Alike().double().eval(), (model("separate")[1],), rewrites=[Window(gain=True)], tolerance=ANY, validate=False
    )
    assert len({id(p) for n, p in fast.named_parameters() if n.endswith(".gain")}) == 2
    assert sorted(n for n in fast.state_dict() if n.startswith("attnopt")) == [
        "attnopt.a_b.gain",
        "attnopt.a_b__1.gain",
    ]


def test_what_a_site_is_given_has_no_dropout() -> None:
    module, x = model("separate", dropout=0.5)
    given: list[Seen] = []
    stage(module.train(), x).visit(lambda key, seen: given.append(seen))
    assert [(s.spec.dropout, len(s.captures), len(s.spec.captures)) for s in given] == [(0.0, 0, 0)]
