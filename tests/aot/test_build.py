"""A dozen specs for Hopper and one for each of the others; `make triton` builds all for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from attnopt.aot.build import build, compile_spec, variants
from attnopt.aot.standard import standard
from attnopt.codegen.triton import Entry, TritonKernel
from attnopt.codegen.triton_plans import CHIPS, Chip
from attnopt.errors import CompileError
from attnopt.runtime.triton_compile import PRODUCTS, Compiled
from attnopt.spec import Heads

ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))
SPECS = dict(standard() if ALL else standard(Heads(8, 2, 2, 64, 64)))
# The compilers for the other chips take longer.
FEW = SPECS if ALL else {"dense": dict(standard(Heads(4, 2, 2, 16, 16)))["dense"]}


@pytest.mark.parametrize(
    ("chip", "names"),
    [("sm_90", tuple(SPECS)), *((c, tuple(FEW)) for c in CHIPS if c != "sm_90")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_specs_fit_the_chip(chip: str, names: tuple[str, ...]) -> None:
    said: list[str] = []
    built: set[str] = set()
    for name, _, kernel, made in build(
        ((n, (SPECS if chip == "sm_90" else FEW)[n]) for n in names), [CHIPS[chip]], "bfloat16", said.append
    ):
        assert made.problem is None, name
        if made.entry != "attention_rows":  # lists the rows that are computed, before the products
            assert made.instructions.get(PRODUCTS[chip], 0) > 0, name
            assert chip not in ("sm_80", "sm_90") or made.instructions["cp.async"] > 0, name
        assert kernel.layout.dtype == "bfloat16"
        built.add(name)
    assert built == set(names)
    assert all(chip in line and "registers" in line for line in said)


@pytest.mark.parametrize("kind", ["decode", "backward"])
@pytest.mark.parametrize("chip", CHIPS if ALL else ["sm_90"])
def test_decodes_and_gradients_fit_the_chip(chip: str, kind: str) -> None:
    said: list[str] = []
    names = tuple(SPECS) if ALL else ("causal",)
    found = list(build(((n, SPECS[n]) for n in names), [CHIPS[chip]], "bfloat16", said.append, (kind,)))
    assert all(made.problem is None for *_, made in found)
    assert any(PRODUCTS[chip] in made.instructions or "mma.sync" in made.instructions for *_, made in found)
    assert {kernel.kind for _, _, kernel, _ in found} == {kind}
    assert {name for name, *_ in found} == set(names)


def test_gradients_are_made_for_a_forward_that_returns_lse() -> None:
    dense, routed = SPECS["dense"], dict(standard(Heads(4, 2, 2, 16, 16)))["routed"]
    lse = replace(dense, returns=("lse",))
    made = [(kind, spec.key) for kind, spec in variants(dense, ("forward", "decode", "backward", "forward"))]
    assert made == [("forward", dense.key), ("forward", lse.key), ("decode", dense.key), ("backward", lse.key)]
    assert [kind for kind, _ in variants(dense, ("forward",))] == ["forward"]
    assert [kind for kind, _ in variants(lse, ("forward", "backward"))] == ["forward", "backward"]
    assert len(list(variants(routed, ("forward", "backward")))) == 2, "rows that are left out have none"


def needs(shared: dict[int, int]) -> Callable[..., Compiled]:
    """A compiler whose kernels need so much shared memory by their tile of keys."""

    def compile_entry(kernel: TritonKernel, entry: Entry, chip: Chip) -> Compiled:
        return Compiled(chip, entry.name, b"", {}, shared.get(kernel.plan.block_n, 1), 4, None, None, {})

    return compile_entry


def test_a_plan_that_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.aot.build.compile_entry", needs({128: 1 << 30}))
    kernel, _ = compile_spec(SPECS["padding"], CHIPS["sm_90"], "bfloat16")
    assert kernel.plan.block_n < 128


def test_where_nothing_fits_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.aot.build.compile_entry", needs(dict.fromkeys((16, 32, 64, 128), 1 << 30)))
    with pytest.raises(CompileError, match=r"needs .* bytes of shared memory"):
        compile_spec(SPECS["padding"], CHIPS["sm_90"], "bfloat16")
    with pytest.raises(CompileError, match="no plan for heads this wide fits"):
        compile_spec(replace(SPECS["padding"], heads=Heads(1, 1, 1, 512, 512)), CHIPS["sm_90"], "bfloat16")


def test_pages_are_compiled_for_and_read_back() -> None:
    said: list[str] = []
    specs = [(name, SPECS[name]) for name in ("causal", "routed")]
    made = list(build(specs, (CHIPS["sm_90"],), "bfloat16", said.append, ("forward",), page=16))
    assert [(name, kernel.layout.page) for name, _, kernel, _ in made] == [("causal", 16)]
    assert "all rows are computed" in said[-1]


def test_a_plan_that_the_compiler_cannot_build_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = needs({})

    def compile_entry(kernel: TritonKernel, entry: Entry, chip: Chip) -> Compiled:
        if kernel.plan.block_n == 128:
            raise CompileError("Triton cannot compile it.")
        return fits(kernel, entry, chip)

    monkeypatch.setattr("attnopt.aot.build.compile_entry", compile_entry)
    kernel, _ = compile_spec(SPECS["padding"], CHIPS["sm_90"], "bfloat16")
    assert kernel.plan.block_n < 128
