"""One frozen `Options`; the only reader of environment variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from attnopt.errors import OptionError
from attnopt.pattern import Pattern, checked

KERNELS = ("auto", "cpp", "triton", "sdpa", "reference")


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of one optimisation. Every field but `patterns` has an environment twin, `ATTNOPT_<NAME>`.

    Attributes:
        kernel: which kernels to use: `auto` (the best that works here), `cpp`, `triton`, `sdpa` or
            `reference`.
        cache_dir: folder of compiled kernels; None means the user's cache folder.
        cxx: C++ compiler command; None means `$CXX`, then `g++`, `clang++`, `c++`.
        compile_timeout: seconds before a compiler is given up.
        lock_timeout: seconds to wait for another process that compiles the same kernel.
        first_use_check: compare each new kernel with the reference on sampled rows at its first use.
        fuel: stop after this many rewritten sites (bisecting); -1 means no limit.
        dump: folder that receives graphs, specs and generated kernels; None means no dump.
        aot_dir: folder that `attnopt aot` wrote; its kernels are used where they fit.
        tune: measure the plans of a Triton kernel at the first call of a shape class, and keep the fastest in the
            cache folder. What was measured before is used either way.
        disable: leave every model as it is.
        patterns: how attention is recognised, in order: the first that claims a node wins. None means
            `attnopt.PATTERNS`; add one with `patterns=(*attnopt.PATTERNS, mine)`.
    """

    kernel: str = "auto"
    cache_dir: str | None = None
    cxx: str | None = None
    compile_timeout: float = 60.0
    lock_timeout: float = 120.0
    first_use_check: bool = True
    fuel: int = -1
    dump: str | None = None
    aot_dir: str | None = None
    tune: bool = False
    disable: bool = False
    patterns: tuple[Pattern, ...] | None = None

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise OptionError(f"option kernel={self.kernel!r} is unknown; choose one of {', '.join(KERNELS)}.")
        for name in ("compile_timeout", "lock_timeout"):
            if getattr(self, name) <= 0:
                raise OptionError(f"option {name}={getattr(self, name)!r} must be a positive number of seconds.")
        if self.patterns is not None:
            object.__setattr__(self, "patterns", checked(self.patterns))

    @classmethod
    def make(cls, given: Options | Mapping[str, object] | None = None) -> Options:
        """Options from the environment, overridden by `given`. Unknown names raise `OptionError`."""
        if isinstance(given, Options):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise OptionError(f"options must be an Options or a mapping, not {type(given).__name__}.")
        values = {**_from_environment(), **(given or {})}
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise OptionError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}.{hint}")
        return cls(**values)  # type: ignore[arg-type]

    @property
    def cache_path(self) -> Path:
        """Where compiled kernels live, before any check of ownership."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        import platformdirs

        return Path(platformdirs.user_cache_dir("attnopt"))


def _from_environment() -> dict[str, object]:
    values: dict[str, object] = {}
    for field in fields(Options):
        text = os.environ.get(f"ATTNOPT_{field.name.upper()}")
        if text is not None and text != "" and field.name != "patterns":
            values[field.name] = _parse(field.name, str(field.type), text)
    return values


def _parse(name: str, kind: str, text: str) -> object:
    try:
        if kind == "bool":
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (KeyError, ValueError):
        raise OptionError(f"environment variable ATTNOPT_{name.upper()}={text!r} is not a valid {kind}.") from None
