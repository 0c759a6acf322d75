"""Patterns that a user brings along: the contract, what misuse gets, and every door that takes them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
import torch._dynamo
from torch import Tensor, fx

import attnopt
from attnopt import Options, Pattern
from attnopt import expr as ex
from attnopt.errors import OptionError
from attnopt.patterns import PATTERNS, Decline, Lifter, Masked, Parts, Place, Region, build, find, frame, shape, width
from attnopt.region import Operand
from attnopt.spec import EmptyRow
from tests.modules import Function, captured

X = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))


@torch.library.custom_op("attnopt_test::plain_attention", mutates_args=())
def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without a scale, as an operator that nobody knows."""
    return (query @ key.mT).softmax(-1) @ value


@plain_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def read(node: fx.Node, constants: Any) -> Region | Decline | None:
    """The pattern of `attnopt_test::plain_attention`."""
    if node.target is not torch.ops.attnopt_test.plain_attention.default:
        return None
    query, key, values = node.args
    framed = frame(node, 2, 3, shape(key)[2], shape(query)[3], None)
    if isinstance(framed, Decline):
        return framed
    b, h = framed.index[:2]
    places = (
        Place(query, (b, h, ex.q, ex.d), ex.q, ex.d),
        Place(key, (b, h, ex.k, ex.d), ex.k, ex.d),
        Place(values, (b, h, ex.k, width), ex.k, width),
    )
    masked = Masked(ex.s, sp.true, EmptyRow.NAN)
    return build(Parts("mine", node, node, masked, *places), framed, Lifter(framed.sizes, constants))


MINE = Pattern("mine", read)
OPTIONS = Options(patterns=(*attnopt.PATTERNS, MINE))


def run(x: Tensor) -> Tensor:
    """The operator on one tensor."""
    return torch.ops.attnopt_test.plain_attention(x, x * 2, x)


# --- every door -------------------------------------------------------------------------------------


def test_without_the_pattern_there_is_no_site() -> None:
    assert not attnopt.explain(Function(run), (X,)).sites


@pytest.mark.parametrize("options", [OPTIONS, {"patterns": (*attnopt.PATTERNS, MINE)}], ids=["Options", "mapping"])
def test_explain_and_optimize_take_it(options: Any) -> None:
    (site,) = attnopt.explain(Function(run), (X,), options=options).sites
    assert (site.status, site.pattern) == ("fused", "mine")
    fast = attnopt.optimize(Function(run), (X,), options=options)
    assert fast.report.fused == 1
    torch.testing.assert_close(fast(X), run(X))


def test_the_compile_backend_takes_it() -> None:
    from attnopt.dynamo import reports

    torch._dynamo.reset()
    fast = torch.compile(run, backend="attnopt", options={"patterns": OPTIONS.patterns, "rest": "eager"})
    torch.testing.assert_close(fast(X), run(X))
    assert [(s.status, s.pattern) for s in reports[-1].sites] == [("fused", "mine")]


def test_options_with_a_pattern_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(OPTIONS)) == OPTIONS


# --- order ------------------------------------------------------------------------------------------


def test_built_in_patterns_are_the_default_and_can_be_left_out() -> None:
    attention = Function(lambda x: (x @ x.mT).softmax(-1) @ x)
    assert attnopt.explain(attention, (X,)).fused == 1
    assert not attnopt.explain(attention, (X,), options=Options(patterns=())).sites
    assert attnopt.PATTERNS is PATTERNS


def _names(*patterns: Pattern) -> list[tuple[str, type]]:
    graph = captured(run, X).gm.graph
    return [(name, type(result)) for _, name, result in find(graph, {}, patterns)]


def test_a_region_wins_over_a_decline_and_the_first_region_over_the_second() -> None:
    refuses = Pattern("refuses", lambda node, constants: Decline("no", node) if read(node, constants) else None)
    assert _names(refuses, MINE, replace(MINE, name="again")) == [("mine", Region)]
    assert _names(refuses, replace(refuses, name="again")) == [("refuses", Decline)]


# --- misuse of the option ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (MINE, "must be a tuple of attnopt.Pattern, not Pattern"),
        ("softmax", "must be a tuple of attnopt.Pattern, not str"),
        (3, "must be a tuple of attnopt.Pattern, not int"),
        ((PATTERNS, MINE), "Did you forget the star"),
        ((read,), "which is no attnopt.Pattern"),
        ((*PATTERNS, PATTERNS[0]), f"'{PATTERNS[0].name}' more than once"),
    ],
)
def test_what_is_no_tuple_of_patterns_is_one_clear_error(given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Options(patterns=given)


@pytest.mark.parametrize(("name", "match"), [("", read), (None, read), ("mine", "read")])
def test_a_pattern_needs_a_name_and_a_function(name: Any, match: Any) -> None:
    with pytest.raises(OptionError, match="pattern"):
        Pattern(name, match)


def test_patterns_have_no_environment_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_PATTERNS", "softmax")
    assert Options.make().patterns is None


# --- misuse of the contract -------------------------------------------------------------------------


def _broken(change: Callable[[Region], Any]) -> Pattern:
    def match(node: fx.Node, constants: Any) -> Any:
        found = read(node, constants)
        return change(found) if isinstance(found, Region) else found

    return Pattern("broken", match)


def _raise(region: Region) -> Any:
    raise ValueError("nothing of the kind")


def _foreign(region: Region) -> Region:
    other = captured(run, X).gm.graph
    return region.replace(query=Operand(next(iter(other.nodes)), region.query.dims))


MISTAKES: tuple[tuple[str, Callable[[Region], Any], str], ...] = (
    ("raises", _raise, "pattern 'broken' raised ValueError: nothing of the kind"),
    ("wrong_type", lambda r: 3, "pattern 'broken' gave int"),
    ("too_few_dims", lambda r: r.replace(key=Operand(r.key.node, r.key.dims[1:])), "its key .* has 4 dimensions"),
    ("swapped_dims", lambda r: r.replace(query=Operand(r.query.node, ("b", "h", "d", "q"))), "dimension 'd' of its query"),
    ("wrong_output", lambda r: r.replace(out_dims=(("b",), ("h",), ("d",), ("q",))), "dimension 'd' of its output"),
    ("output_unnamed", lambda r: r.replace(out_dims=r.out_dims[1:]), "its output has 4 dimensions"),
    ("unknown_dim", lambda r: r.replace(out_dims=(("b",), ("h",), ("q", "d"), ("x",))), "needs the dimensions 'q' and 'd'"),
    ("captures", lambda r: r.replace(captures={"bias": r.key}), "captures are not those of its spec"),
    ("no_tensor", lambda r: r.replace(value=Operand(3, r.value.dims)), "its value %3 is no tensor"),
    ("other_graph", _foreign, "its query is a node of another graph"),
    ("after_the_output", lambda r: r.replace(value=Operand(r.output, r.value.dims)), "made after the output"),
    ("bad_spec", lambda r: r.replace(spec=replace(r.spec, score=sp.Symbol("unknown"))), "region that does not fit"),
    ("empty", lambda r: r.replace(spec=None), "region that does not fit"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_mistake_of_a_pattern_is_a_decline_that_names_it(name: str, change: Any, words: str) -> None:
    options = Options(patterns=(*PATTERNS, _broken(change)))
    model = Function(run)
    fast = attnopt.optimize(model, (X,), options=options)
    (site,) = fast.report.sites
    assert site.status == "declined"
    assert re.search(words, site.reason), site.reason
    assert torch.equal(fast(X), model(X))


def test_a_region_that_cannot_be_lowered_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(lowering: Any, region: Region) -> None:
        lowering.graph.call_function(torch.ops.aten.relu.default, (region.query.node,))
        raise KeyError("x")

    monkeypatch.setattr("attnopt.passes.lower.Lowering.lower", fail)
    fast = attnopt.optimize(Function(run), (X,), options=OPTIONS)
    (site,) = fast.report.sites
    assert (site.status, "could not be rewritten: KeyError" in site.reason) == ("declined", True)
    assert torch.equal(fast(X), run(X))


def test_a_wrong_reading_is_caught_by_validation() -> None:
    def triple(region: Region) -> Region:
        return region.replace(spec=replace(region.spec, score=3 * ex.s))

    fast = attnopt.optimize(Function(run), (X,), options=Options(patterns=(_broken(triple),)))
    assert "validation failed" in fast.report.sites[0].reason
    assert torch.equal(fast(X), run(X))
