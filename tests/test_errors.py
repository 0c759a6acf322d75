"""The exception family and `Decline`."""

from __future__ import annotations

import pytest

from attnopt import errors


@pytest.mark.parametrize(
    "name",
    [
        "OptionError",
        "CaptureError",
        "ShapeError",
        "SpecError",
        "CompileError",
        "CacheError",
        "ValidationError",
        "UnfusedError",
    ],
)
def test_every_error_is_an_attnopt_error(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.AttnoptError)
    assert error.__doc__


@pytest.mark.parametrize("name", ["OptionError", "ShapeError", "SpecError"])
def test_misuse_is_also_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match="wrong"):
        raise getattr(errors, name)("wrong")


def test_a_decline_reads_with_its_node() -> None:
    assert str(errors.Decline("scores are used twice", "bmm_1")) == "scores are used twice (at %bmm_1)"


def test_a_decline_reads_without_a_node() -> None:
    assert str(errors.Decline("no value contraction")) == "no value contraction"


def test_a_decline_is_a_frozen_value() -> None:
    decline = errors.Decline("why", "n")
    assert decline == errors.Decline("why", "n")
    with pytest.raises(AttributeError):
        decline.reason = "other"  # type: ignore[misc]
