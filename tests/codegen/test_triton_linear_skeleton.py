"""The linear skeleton is Python, and says for what its constants stand."""

from __future__ import annotations

import ast

from attnopt.codegen.triton_linear_skeleton import LINEAR


def test_it_is_python_with_three_kernels() -> None:
    functions = [f for f in ast.parse(LINEAR).body if isinstance(f, ast.FunctionDef)]
    assert [f.name for f in functions if f.name.startswith("linear_")] == [
        "linear_state",
        "linear_scan",
        "linear_forward",
    ]
    assert all(ast.get_docstring(f) for f in functions)
