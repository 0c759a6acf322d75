"""The usual attentions: at least a dozen, each one printable for every dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.aot.standard import layout_for, standard
from attnopt.codegen import triton
from attnopt.codegen.base import CaptureLayout
from attnopt.spec import AttentionSpec, Heads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_one_has_a_kernel(dtype: str) -> None:
    for name, spec in standard():
        spec.verify()
        assert triton.supported(spec, layout_for(spec, dtype)) is None, name


def test_names_and_keys_are_distinct() -> None:
    found = list(standard(Heads(4, 2, 2, 32, 32)))
    assert len(found) >= 12
    assert len({name for name, _ in found}) == len({spec.key for _, spec in found}) == len(found)
    for _, spec in found:
        assert AttentionSpec.parse(spec.text) == spec.canonical()
        assert spec.heads == Heads(4, 2, 2, 32, 32)


def test_a_layout_is_that_of_tensors_without_gaps() -> None:
    """As the runtime reads it off them: a capture that no key indexes has no stride of keys."""
    specs = dict(standard())
    assert layout_for(specs["alibi"], "bfloat16").captures == (CaptureLayout("float32", None),)
    assert layout_for(specs["bias"], "bfloat16").captures == (CaptureLayout("float32", 1),)
    assert layout_for(specs["padding"], "bfloat16").captures == (CaptureLayout("int64", 1),)
    flag = replace(specs["padding"], captures=(replace(specs["padding"].captures[0], kind="bool"),))
    assert layout_for(flag, "bfloat16").captures == (CaptureLayout("bool", 1),)
