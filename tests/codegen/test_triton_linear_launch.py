"""Every kernel of a linear file is launched, with as many arguments as it takes."""

from __future__ import annotations

import ast

from attnopt.codegen.triton_linear_gradient import GRADIENT
from attnopt.codegen.triton_linear_launch import LAUNCH
from attnopt.codegen.triton_linear_skeleton import LINEAR


def test_every_kernel_is_launched() -> None:
    tree = ast.parse(LINEAR + GRADIENT)
    kernels = {f.name for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("linear_")}
    assert len(kernels) == 7
    launched = {
        n.value
        for call in ast.walk(ast.parse(LAUNCH))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "run"
        for n in ast.walk(call.args[0])
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    assert launched == kernels | {"linear_sums"}


def test_what_it_offers() -> None:
    functions = [f for f in ast.parse(LAUNCH).body if isinstance(f, ast.FunctionDef)]
    assert {"linear", "linear_backward", "linear_backward_rate"} < {f.name for f in functions}
    assert all(ast.get_docstring(f) for f in functions)
