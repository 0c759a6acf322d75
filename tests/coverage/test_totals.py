from __future__ import annotations

import pytest

from attnopt.coverage.totals import Totals, generic, outside
from tests.coverage.rows import row, site


def test_sites_add_up() -> None:
    totals = Totals.of([
        row("a"),
        row("a", "decode", sites=[site(), site("declined", reason="why (at %add_3)")]),
        row("b", missed=[{"name": "softmax", "module": "", "source": ""}], errors={"units": 2.5, "fp64": 1e-12}),
        {"architecture": "c", "variant": "eager", "status": "not built", "reason": "no model"},
    ])  # fmt: skip
    assert (totals.sites, totals.fused, totals.missed) == (5, 3, 1)
    assert totals.declined == {"why": 1}
    assert totals.unexplained == 1
    assert totals.unbuilt == {"c": "no model"}
    assert (totals.units, totals.worst, totals.fp64) == (2.5, "b eager", 1e-12)


def test_a_graph_left_as_it_is_counts_where_something_in_it_makes_weights() -> None:
    left = [{"why": "no trace", "normalizers": 2}, {"why": "no trace", "normalizers": 0}]
    totals = Totals.of([row("a", unknown=left), row("b")])
    assert (totals.unknown, totals.sites, totals.missed) == (1, 2, 0)


def test_what_is_no_attention_is_no_site() -> None:
    other = site("declined", reason="no contraction of queries and keys makes the scores", module="attention.self")
    totals = Totals.of([row("convbert", sites=[site(), other], others=2)])
    assert (totals.sites, totals.fused, totals.others, totals.unexplained) == (1, 1, 3, 0)
    assert not totals.declined


def test_inductor_stands_beside_the_eager_row_of_the_same_model() -> None:
    counted = {"architecture": "a", "variant": "inductor", "status": "counted", "fused": 1, "s": 1.0}
    totals = Totals.of([row("a", sites=[site(), site()]), row("a", "sdpa"), row("b"), counted])
    assert (totals.inductor, totals.inductor_sites, totals.inductor_ours, totals.inductor_models) == (1, 2, 2, 1)


@pytest.mark.parametrize(
    ("errors", "word"),
    [
        ({"units": 1.1, "fp64": 1e-14}, ""),
        ({"units": 5.0, "fp64": 1e-14}, "eager's error"),
        ({"units": 1.0, "fp64": 1e-3}, "in fp64"),
        ({"units": 1.0, "astray": 4}, "numbers where"),
        ({"units": None, "why": "shapes"}, "cannot be compared"),
        ({"units": None, "change": 1e-7}, ""),
    ],
)
def test_outputs_beyond_rounding_are_named(errors: dict[str, object], word: str) -> None:
    found = outside(row(errors=errors))
    assert word in found
    assert bool(found) == bool(word)


def test_a_generic_reason_has_no_node() -> None:
    assert generic("of a form (at %add_12)") == "of a form"
    assert generic("%x_1 is written") == "%… is written"
