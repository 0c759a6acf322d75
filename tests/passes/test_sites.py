"""Sites by name, pattern, number and function, and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from attnopt.errors import OptionError
from attnopt.passes.sites import chosen_sites, site_key
from attnopt.spec import AttentionSpec, Heads

PATHS = ("first.attn", "first.attn#1", "last.attn")
SPECS = {path: AttentionSpec(Heads(n, n, n, 8, 8)) for path, n in (("first.attn", 4), ("last.attn", 2))}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, PATHS),
        (["last.attn", "first.attn"], ("first.attn", "last.attn")),
        (["first.*"], PATHS[:2]),
        ([2, 0], ("first.attn", "last.attn")),
        ([], ()),
        (lambda path, spec: spec.heads.q > 2, ("first.attn",)),
        (lambda path, spec: path.startswith("first"), ("first.attn",)),
    ],
)
def test_what_is_meant(given: Any, found: tuple[str, ...]) -> None:
    assert chosen_sites(PATHS, SPECS, given, "some") == list(found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("last.attn", "write \\['last.attn'\\]"),
        (1, "write \\[1\\]"),
        (["middle"], "no attention site 'middle'; the 3 sites are first.attn, first.attn#1, last.attn"),
        ([3], "no attention site 3"),
        ([-1], "no attention site -1"),
        ([True], "no attention site True"),
        (lambda path: True, "the function of sites= failed for 'first.attn': TypeError"),
        (lambda path, spec: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_not_there_is_one_clear_error(given: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        chosen_sites(PATHS, SPECS, given, "some")


def test_a_number_is_that_of_the_report() -> None:
    assert site_key(PATHS, 1, "some") == "first.attn#1"
