"""A kernel's key follows its text."""

from __future__ import annotations

from attnopt.codegen.base import Kernel, Layout, Plan


def test_key_follows_the_text() -> None:
    one, same, other = (Kernel("cpp", text, "k", Layout("float32"), Plan()) for text in ("a", "a", "b"))
    assert one.key == same.key != other.key
