"""Kernels that read keys in pages: what their text says, and the specs that have none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.aot.standard import layout_for, standard
from attnopt.codegen import cpp, triton
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_kinds import EMIT, missing
from attnopt.codegen.triton_pages import whole_tiles
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, Capture, Heads

SPECS = dict(standard(Heads(8, 2, 2, 64, 64)))
PLAN = TritonPlan(16, 64, 4, 2)


def text(kind: str, name: str, page: int) -> str:
    spec = SPECS[name]
    return EMIT[kind](spec, replace(layout_for(spec, "bfloat16"), page=page), PLAN).source


@pytest.mark.parametrize("kind", ["forward", "decode"])
def test_a_tile_within_a_page_has_one_look_up(kind: str) -> None:
    whole, cut = text(kind, "causal_bottom_right", 128), text(kind, "causal_bottom_right", 48)
    assert whole_tiles(Layout("bfloat16", page=128), 64)
    assert not whole_tiles(Layout("bfloat16", page=48), 64)
    assert "slot = tl.cast(k0, tl.int32)\n" in whole
    assert "slot = k0 + tl.arange(0, BLOCK_N)\n" in cut
    for source in (whole, cut):
        assert "layout  bfloat16; pages of " in source
        assert "tl.cast(b, tl.int64) * k_stride0" not in source
        assert (
            "n_k," not in source.split(f"def attention_{'forward' if kind == 'forward' else 'split'}(")[1].split(")")[0]
        )
        assert max(map(len, source.splitlines())) <= 120


def test_without_pages_no_text_speaks_of_them() -> None:
    for kind in ("forward", "decode"):
        assert "page" not in text(kind, "causal", 0)


def test_each_entry_has_its_own_number_of_keys() -> None:
    source = text("decode", "causal_bottom_right", 16)
    for kernel in ("attention_split", "attention_combine"):
        body = source.split(f"def {kernel}(")[1].split("\n\n\n")[0]
        assert "n_k = tl.minimum(tl.maximum(n_k, 0), n_slots * PAGE)" in body


def test_new_keys_follow_those_in_pages() -> None:
    spec = SPECS["causal_bottom_right"]
    layout = replace(layout_for(spec, "bfloat16"), page=128, new=True)
    for kind in ("forward", "decode"):
        source = EMIT[kind](spec, layout, PLAN).source
        assert "pages of 128 keys, and new ones" in source
        assert "n_k = n_held + n_new" in source
        assert "new_first, new_last, True," in source
        keys, new = source.split("def visit_new(")
        assert "new_k_ptr" not in keys
        assert "tl.cast(k0 - n_held, tl.int64) * new_k_stride2 + new_k_offsets" in new
        assert max(map(len, source.split("def attention(")[0].splitlines())) <= 120


def test_what_no_kernel_does_with_pages_is_declined() -> None:
    paged = Layout("bfloat16", page=16)
    dense, routed = SPECS["dense"], SPECS["routed"]
    assert "no gradients of keys in pages" in str(triton.supports_backward(dense, paged))
    assert "one tensor" in str(cpp.supported(dense, paged))
    assert "in pages" in str(missing("linear", SPECS["retention"], paged))
    assert "all rows are computed" in str(missing("forward", routed, replace(layout_for(routed, "bfloat16"), page=16)))
    with pytest.raises(SpecError, match="all rows are computed"):
        text("forward", "routed", 16)
    assert "attention_split" in text("decode", "routed", 16)
    with pytest.raises(SpecError, match="positions alone"):
        triton.emit(dense, paged, replace(PLAN, listed=True))
    with pytest.raises(SpecError, match="at least one key"):
        triton.emit(dense, Layout("bfloat16", page=-1), PLAN)


def test_names_of_tables_are_taken() -> None:
    bias = Capture("page_table", "float", (None, None))
    spec = AttentionSpec(
        Heads(2, 2, 2, 16, 16), score=ex.s + ex.load("page_table", ex.q, ex.k), keep=sp.true, captures=(bias,)
    )
    layout = layout_for(spec, "float32")
    assert triton.supported(spec, layout) is None
    with pytest.raises(SpecError, match="'page_table' is no name of a capture"):
        triton.emit(spec, replace(layout, page=16), PLAN)
