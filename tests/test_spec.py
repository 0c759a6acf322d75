"""`AttentionSpec`: its key, its text, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.expr import k, q, s
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Softmax
from tests.specs import CASES, Case

PLAIN = AttentionSpec(Heads(4, 2, 2, 8, 8), score=s / 8, keep=k <= q)


@pytest.mark.parametrize("item", CASES, ids=str)
def test_text_round_trip(item: Case) -> None:
    again = AttentionSpec.parse(item.spec.text)
    assert again.text == item.spec.text
    assert again.key == item.spec.key
    assert hash(again) == hash(item.spec)
    assert str(again) == str(item.spec.canonical())


def test_every_case_has_its_own_key() -> None:
    assert len({c.spec.key for c in CASES}) == len({c.spec.text for c in CASES})


def test_keys_are_the_same_in_every_process() -> None:
    code = "from tests.specs import CASES; print(','.join(c.spec.key for c in CASES[:12]))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {",".join(c.spec.key for c in CASES[:12]) + "\n"}


def test_equal_mathematics_has_one_key() -> None:
    assert replace(PLAIN, score=ex.number(0.125) * s, keep=sp.Not(k > q)).key == PLAIN.key
    assert replace(PLAIN, empty_row=EmptyRow.ZERO).key != PLAIN.key


WRONG = (
    (replace(PLAIN, heads=Heads(0, 1, 1, 8, 8)), "must be positive"),
    (replace(PLAIN, heads=Heads(4, 3, 3, 8, 8)), "k_map must give"),
    (replace(PLAIN, heads=Heads(2, 2, 2, 8, 8, (0, 2))), "k_map must give"),
    (replace(PLAIN, keep=s), "keep must be a boolean"),
    (replace(PLAIN, dropout=1.0), "dropout must be"),
    (replace(PLAIN, returns=("attentions",)), "unknown side outputs"),
    (replace(PLAIN, captures=(Capture("a b", "float", ()),)), "distinct identifiers"),
    (replace(PLAIN, score=s + ex.load("bias", q)), "not among the captures"),
    (
        replace(PLAIN, score=s + ex.load("bias", q), captures=(Capture("bias", "float", (None, None)),)),
        "with 1 indices",
    ),
    (replace(PLAIN, score=s + ex.load("bias", q / 2), captures=(Capture("bias", "float", (None,)),)), "no integer"),
    (replace(PLAIN, score=s + sp.Symbol("x")), "mentions x"),
    (replace(PLAIN, gate=k), "mentions k"),
    (replace(PLAIN, normalizer=Softmax(ex.scalar("q"))), "mentions q"),
    (replace(PLAIN, score=sp.gamma(s)), "no backend knows"),
)


@pytest.mark.parametrize(("spec", "message"), WRONG, ids=range(len(WRONG)))
def test_verify_refuses(spec: AttentionSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec.verify()


def _changed(**parts: object) -> str:
    return json.dumps({**json.loads(PLAIN.text), **parts})


HOSTILE = (
    "", "null", "[]", "3", '"x"', "{", "{}", "[" * 100_000, _changed(version=1), _changed(version="2"), _changed(heads=[1]),
    _changed(heads=[4, 2, 2, 8, 8, [0] * 4, "abcd"]), _changed(heads=[1e400] * 7), _changed(heads=None), _changed(score=["eval"]),
    _changed(score={"a": 1}), _changed(keep=["num", "1", "1"]), _changed(normalizer={}), _changed(normalizer={"kind": "os.system"}),
    _changed(empty_row="maybe"), _changed(dropout="nan"), _changed(dropout=-1), _changed(returns=["x"]), _changed(captures=[["a"]]),
    _changed(captures=[["a", "float", ["x"]]]), _changed(scalars=["import os"]), _changed(gate=["sym", "k"]), _changed(heads=[0] * 7), _changed(heads=[10**12, 1, 1, 8, 8, [], []]),
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_raises_spec_errors_only(text: str) -> None:
    with pytest.raises(SpecError):
        AttentionSpec.parse(text)


def test_readable_line() -> None:
    assert str(PLAIN) == "4/2 heads, d=8; score s/8; keep k <= q (empty row: nan)"
    assert str(Heads(4, 2, 4, 8, 5, (1, 0, 1, 0))) == "4/2/4 heads, d=8/5, head table"


def test_capture_by_name() -> None:
    spec = replace(PLAIN, captures=(Capture("pad", "bool", (None, None)),))
    assert spec.capture("pad").kind == "bool"
