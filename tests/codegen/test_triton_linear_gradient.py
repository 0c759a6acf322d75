"""The kernels of the linear gradients are Python, and have an argument for every stride."""

from __future__ import annotations

import ast

from attnopt.codegen.triton_linear_gradient import GRADIENT
from attnopt.codegen.triton_linear_skeleton import LINEAR


def test_the_kernels_of_gradients() -> None:
    functions = [f for f in ast.parse(GRADIENT).body if isinstance(f, ast.FunctionDef)]
    names = [f.name for f in functions]
    assert names == ["linear_dq", "later", "linear_later", "linear_dkv", "linear_drate"]
    assert all(ast.get_docstring(f) for f in functions)


def test_a_kernel_gets_as_many_arguments_as_it_has_strides_for() -> None:
    for function in ast.parse(LINEAR + GRADIENT).body:
        if not isinstance(function, ast.FunctionDef) or not function.name.startswith("linear_"):
            continue
        names = [a.arg for a in function.args.args]
        strided = {n.split("_stride")[0] for n in names if "_stride" in n}
        assert strided <= {n.removesuffix("_ptr") for n in names if n.endswith("_ptr")}
