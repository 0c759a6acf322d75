"""The kernels of the linear gradients are Python, and every kernel of a file is launched."""

from __future__ import annotations

import ast

from attnopt.codegen.triton_linear_gradient import GRADIENT, LAUNCH
from attnopt.codegen.triton_linear_skeleton import LINEAR


def test_every_kernel_is_launched() -> None:
    tree = ast.parse(LINEAR + GRADIENT)
    kernels = {f.name for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("linear_")}
    assert len(kernels) == 6
    launched = {
        n.value
        for call in ast.walk(ast.parse(LAUNCH))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "run"
        for n in ast.walk(call.args[0])
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    assert launched == kernels | {"linear_sums"}


def test_a_kernel_gets_as_many_arguments_as_it_has_strides_for() -> None:
    for function in ast.parse(LINEAR + GRADIENT).body:
        if not isinstance(function, ast.FunctionDef) or not function.name.startswith("linear_"):
            continue
        names = [a.arg for a in function.args.args]
        strided = {n.split("_stride")[0] for n in names if "_stride" in n}
        assert strided <= {n.removesuffix("_ptr") for n in names if n.endswith("_ptr")}
