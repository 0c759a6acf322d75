"""The kernels that choose blocks are Python, and every one is launched."""

from __future__ import annotations

import ast

from attnopt.codegen.triton_select_skeleton import LAUNCH, SELECT


def test_every_kernel_is_launched() -> None:
    functions = [f for f in ast.parse(SELECT).body if isinstance(f, ast.FunctionDef)]
    kernels = {f.name for f in functions if f.name.startswith("select_")}
    assert kernels == {"select_means", "select_scores", "select_choose", "select_list"}
    launched = {
        n.value.id
        for n in ast.walk(ast.parse(LAUNCH))
        if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name)
    }
    assert kernels <= launched
    assert all(ast.get_docstring(f) for f in functions)
