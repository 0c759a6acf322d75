"""What every linear kernel begins with is written once."""

from __future__ import annotations

import ast

from attnopt.codegen.triton_linear_parts import kernel, strided


def test_arguments_places_and_bases() -> None:
    text = kernel("one", "What it does.", "q v rate dtotal dq", "n_q segments", "\n    store(q_base, rate)\n")
    (made,) = ast.parse(text).body
    assert isinstance(made, ast.FunctionDef)
    names = [a.arg for a in made.args.args]
    pointers, sizes = ["q_ptr", "v_ptr", "rate_ptr", "dtotal_ptr", "dq_ptr"], ["n_q", "segments"]
    strides = [f"{x}_stride{i}" for x, n in (("q", 3), ("v", 3), ("rate", 2), ("dq", 3)) for i in range(n)]
    assert names == [*pointers, *sizes, *strides]
    assert ast.get_docstring(made) == "What it does."
    assert "do_not_specialize=['n_q', 'segments']" in text
    assert "segment = tl.program_id(0) % segments" in text
    assert "b = tl.program_id(0) // segments // HEADS" in text
    assert "v_base = base(v_ptr, v_stride0, v_stride1, b, value_head(h))" in text
    assert text.rstrip().endswith("store(q_base, rate)")


def test_a_grid_of_more_places_and_lines_of_any_length() -> None:
    tensors = "states " + " ".join(f"tensor_number_{i}" for i in range(12))
    text = kernel("one", "What it does.", tensors, "n", "    pass", (("part", "PARTS"), ("segment", "segments")))
    assert "segment = tl.program_id(0) // PARTS % segments" in text
    assert "h = tl.program_id(0) // PARTS // segments % HEADS" in text
    assert max(map(len, text.splitlines())) <= 120
    assert strided(tensors) == tensors.split()[1:]
