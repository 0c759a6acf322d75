"""The state of a linear attention in C++: what it holds for decays by rate, by place, and for gradients of rates."""

from __future__ import annotations

import re

from attnopt.codegen.cpp_linear_skeleton import LINEAR
from attnopt.codegen.cpp_linear_state import STATE


def test_it_is_part_of_the_skeleton() -> None:
    assert STATE.strip() in LINEAR
    assert STATE.count("{") == STATE.count("}")
    assert not re.findall(r"@\w+@", STATE), "only rows have holes"


def test_what_only_some_kernels_keep_takes_no_memory_in_others() -> None:
    for name in ("aged", "late", "beside", "exact_aged", "key_ages"):
        assert re.search(rf"\b{name}\[kTimed \? [^:]+ : 1\]", STATE), name
