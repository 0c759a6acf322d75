"""`Options`: defaults, overrides, environment twins, and what misuse gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from attnopt.errors import OptionError
from attnopt.options import KERNELS, Options


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in dataclasses.fields(Options):
        monkeypatch.delenv(f"ATTNOPT_{field.name.upper()}", raising=False)


def test_none_gives_the_defaults() -> None:
    assert Options.make() == Options() == Options.make({})


def test_given_options_pass_through_unchanged() -> None:
    options = Options(kernel="reference")
    assert Options.make(options) is options


def test_a_mapping_overrides() -> None:
    assert Options.make({"kernel": "sdpa", "fuel": 3}) == Options(kernel="sdpa", fuel=3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_name_is_accepted(kernel: str) -> None:
    assert Options(kernel=kernel).kernel == kernel


def test_an_unknown_name_is_an_error_with_a_hint() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'kernal'.*Did you mean 'kernel'"):
        Options.make({"kernal": "cpp"})


def test_an_unknown_kernel_is_an_error_that_lists_the_choices() -> None:
    with pytest.raises(OptionError, match="auto, cpp, triton, sdpa, reference"):
        Options(kernel="cuda")


def test_something_that_is_no_mapping_is_an_error() -> None:
    with pytest.raises(OptionError, match="not list"):
        Options.make(["kernel"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["compile_timeout", "lock_timeout"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_time_limits_are_positive(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=rf"{name}=.*positive"):
        Options(**{name: value})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("kernel", "reference", "reference"),
        ("cxx", "clang++", "clang++"),
        ("compile_timeout", "2.5", 2.5),
        ("fuel", "7", 7),
        ("disable", "1", True),
        ("first_use_check", "false", False),
    ],
)
def test_every_kind_of_option_has_an_environment_twin(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"ATTNOPT_{name.upper()}", text)
    assert getattr(Options.make(), name) == value


def test_what_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_KERNEL", "reference")
    assert Options.make({"kernel": "cpp"}).kernel == "cpp"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_FUEL", "")
    assert Options.make().fuel == -1


@pytest.mark.parametrize(("name", "text"), [("fuel", "many"), ("disable", "maybe"), ("compile_timeout", "soon")])
def test_an_unreadable_variable_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"ATTNOPT_{name.upper()}", text)
    with pytest.raises(OptionError, match=rf"ATTNOPT_{name.upper()}='{text}'"):
        Options.make()


def test_cache_path_prefers_the_option(tmp_path: Path) -> None:
    assert Options(cache_dir=str(tmp_path)).cache_path == tmp_path
    assert Options(cache_dir="~/kernels").cache_path == Path.home() / "kernels"


def test_cache_path_defaults_to_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Options().cache_path == tmp_path / "attnopt"


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().kernel = "cpp"  # type: ignore[misc]
