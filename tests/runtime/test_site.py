"""What a dispatcher keeps of a spec."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from attnopt.runtime.site import Reference, Site
from attnopt.select import Select
from tests.runtime.cases import BIASED, CAUSAL


def test_what_runs_where_no_kernel_does() -> None:
    assert Site(CAUSAL.canonical().text).fallback().name == "sdpa"
    assert isinstance(Site(BIASED.canonical().text).fallback(), Reference)


def test_a_selection_runs_as_a_mask() -> None:
    chosen = replace(CAUSAL, select=Select("topk", (sp.Integer(1),), 4, 4)).canonical()
    site = Site(chosen.text)
    assert site.lowered is not None
    assert site.lowered.captures[-1].name == "chosen"
    assert site.fallback().name == "reference", "torch's own attention visits all keys"
    assert Site(CAUSAL.canonical().text).lowered is None
