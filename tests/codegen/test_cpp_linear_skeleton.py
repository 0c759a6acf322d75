"""The holes of the linear skeleton are the ones that its emitter fills."""

from __future__ import annotations

import re

from attnopt.codegen.cpp_linear_skeleton import LINEAR


def test_holes() -> None:
    assert set(re.findall(r"@(\w+)@", LINEAR)) == {"DIVIDE", "ABI", "KEY"}
