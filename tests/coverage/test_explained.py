from __future__ import annotations

import re

import pytest

from attnopt.coverage.catalogue import architectures
from attnopt.coverage.explained import EXPLANATIONS, explain
from tests.coverage.rows import row, site


def test_a_reason_is_looked_up_by_architecture_reason_and_module() -> None:
    declined = site("declined", reason="no contraction of queries and keys makes the scores (at %softmax)")
    declined["module"] = "encoder.layer.0.attention.self"
    assert explain(row("convbert"), declined) is not None
    assert explain(row("bert"), declined) is None
    assert explain(row("convbert"), {**declined, "reason": "another"}) is None


@pytest.mark.parametrize("number", range(len(EXPLANATIONS)))
def test_every_explanation_is_of_an_architecture_and_is_a_sentence(number: int) -> None:
    pytest.importorskip("transformers")
    found = EXPLANATIONS[number]
    assert any(re.fullmatch(found.architectures, name) for name in architectures())
    assert found.text.endswith(".")
