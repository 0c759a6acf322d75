"""The linear skeleton is Python whose kernels all have their launch."""

from __future__ import annotations

import ast

from attnopt.codegen.triton_linear_skeleton import LAUNCH, LINEAR


def test_every_kernel_is_launched() -> None:
    kernels = [
        f.name for f in ast.parse(LINEAR).body if isinstance(f, ast.FunctionDef) and f.name.startswith("linear_")
    ]
    assert kernels == ["linear_forward", "linear_dq", "linear_dkv"]
    launched = {n.value.id for n in ast.walk(ast.parse(LAUNCH)) if isinstance(n, ast.Subscript)
                and isinstance(n.value, ast.Name)}  # fmt: skip
    assert set(kernels) <= launched
