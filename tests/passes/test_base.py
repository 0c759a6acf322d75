"""The driver of rewrites checks order and results."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from attnopt.errors import Decline, RewriteError
from attnopt.passes.base import Rule, check_order, run
from attnopt.spec import AttentionSpec, Heads


class _Region(SimpleNamespace):
    merge = ()

    @property
    def whole(self) -> AttentionSpec:
        return self.spec

    def replace(self, **changes: Any) -> _Region:
        return _Region(**{**vars(self), **changes})


REGION: Any = _Region(spec=AttentionSpec(Heads(2, 2, 2, 4, 4)), rewrites=())


def test_a_missing_requirement_is_named() -> None:
    needs = Rule("second", lambda r: r, requires=frozenset({"lines"}))
    check_order([Rule("first", lambda r: r, provides=frozenset({"lines"})), needs])
    with pytest.raises(RewriteError, match="second requires lines"):
        check_order([needs])


def test_changes_are_recorded_and_declines_collected() -> None:
    rules = [Rule("same", lambda r: r), Rule("no", lambda r: Decline("not here")), Rule("new", lambda r: r.replace())]
    found, declines = run(REGION, rules)
    assert found.rewrites == ("new",)
    assert [d.reason for d in declines] == ["no: not here"]


def test_an_invalid_spec_names_the_rewrite() -> None:
    broken = Rule("broken", lambda r: r.replace(spec=replace(r.spec, dropout=2.0)))
    with pytest.raises(RewriteError, match="broken made an invalid spec"):
        run(REGION, [broken])
