"""Machine code for chips that are not here."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from attnopt.codegen import triton
from attnopt.codegen.triton_plans import _TABLE, CHIPS, TritonPlan
from attnopt.errors import CompileError
from attnopt.runtime.triton_compile import PRODUCTS, compile_entry, signature
from attnopt.spec import Heads
from tests.codegen.test_triton import layout
from tests.specs import case, with_heads

ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))


def kernel(plan: TritonPlan, width: int = 64, dtype: str = "bfloat16") -> triton.TritonKernel:
    spec = with_heads(case("causal"), Heads(8, 2, 2, width, width)).spec
    return triton.emit(spec, layout(spec, dtype), plan)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.name)
def test_products_run_on_tensor_cores_and_fit(chip: object) -> None:
    made = kernel(TritonPlan(64, 32, 4, 2))
    found = compile_entry(made, made.entries[0], chip)  # type: ignore[arg-type]
    assert found.problem is None
    assert found.instructions.get(PRODUCTS[found.chip.name], 0) > 0
    assert found.binary[:4] == b"\x7fELF"
    if found.chip.backend == "cuda":
        assert found.instructions["cp.async"] > 0
    assert found.spills in (0, None)


def test_both_kernels_of_a_decode_compile() -> None:
    spec = with_heads(case("sink"), Heads(8, 2, 2, 64, 64)).spec
    made = triton.emit_decode(spec, layout(spec, "bfloat16"), TritonPlan(16, 64, 4, 3))
    split, combine = (compile_entry(made, entry, CHIPS["sm_90"]) for entry in made.entries)
    assert split.instructions["mma.sync"] > 0
    assert split.instructions["cp.async"] > 0
    assert split.problem is combine.problem is None


def test_what_does_not_fit_is_said() -> None:
    chip = replace(CHIPS["sm_90"], shared=1024)
    made = kernel(TritonPlan(64, 32, 4, 2))
    assert "1024" in (compile_entry(made, made.entries[0], chip).problem or "")


def test_the_compilers_words_are_kept() -> None:
    made = kernel(TritonPlan(64, 32, 4, 2))
    broken = replace(made, source=made.source.replace("tl.dot(queries, keys)", "tl.dot(queries, values)"))
    with pytest.raises(CompileError, match="sm_90"):
        compile_entry(broken, broken.entries[0], CHIPS["sm_90"])


def test_the_usual_layout_is_aligned() -> None:
    types, constants, attributes = signature(kernel(TritonPlan(64, 32, 4, 2)).entries[0])
    assert constants == {"q_stride3": 1, "k_stride3": 1, "v_stride3": 1, "out_stride3": 1}
    assert types["q_ptr"] == "*bf16"
    assert types["n_k"] == "i32"
    places = list(types)
    divisible = {places[key[0]] for key in attributes}
    assert {"q_ptr", "out_ptr", "k_stride2"} <= divisible
    assert not {"n_k", "n_q", "q_stride3"} & divisible


ROWS = [(chip, width, size, row) for (chip, size, width), rows in _TABLE.items() for row in rows]


# All of them under `make triton`.
@pytest.mark.parametrize(("chip", "width", "size", "row"), ROWS if ALL else ROWS[2:3], ids=str)
def test_every_plan_fits(chip: str, width: int, size: int, row: tuple[int, int, int, int]) -> None:
    made = kernel(TritonPlan(*row, CHIPS[chip].fp32), width, "bfloat16" if size == 2 else "float32")
    assert compile_entry(made, made.entries[0], CHIPS[chip]).problem is None
