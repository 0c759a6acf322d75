"""`ATTNOPT_DUMP=folder`: the graph and the specs after every step, in files whose names sort in order.

Off, it costs one look-up a step. Later dumps into the same folder continue its numbers, so nothing is overwritten.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from attnopt.errors import OptionError

_folder: ContextVar[Path | None] = ContextVar("attnopt_dump", default=None)


@contextlib.contextmanager
def to(folder: str | None) -> Iterator[None]:
    """Dump every step inside; None leaves it off (or on, inside another).

    Raises `OptionError` for a folder that cannot be made or written to.
    """
    if not folder:
        yield
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise OptionError(
            f"ATTNOPT_DUMP (or the option dump) must name a folder to write to, not {folder!r}: {error}."
        ) from error
    token = _folder.set(path)
    try:
        yield
    finally:
        _folder.reset(token)


def active() -> bool:
    """Whether steps are dumped: what is costly to describe is described only then."""
    return _folder.get() is not None


def step(name: str, texts: Mapping[str, str]) -> None:
    """Write `NN_name` with each ending, such as `_graph.py`. Does nothing while dumping is off."""
    folder = _folder.get()
    if folder is None:
        return
    used = [int(m[1]) for m in (re.match(r"(\d+)_", path.name) for path in folder.iterdir()) if m]
    number = max(used, default=-1) + 1
    for ending, text in texts.items():
        (folder / f"{number:02}_{name}{ending}").write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def graph(name: str, gm: Any, texts: Mapping[str, str] | None = None) -> None:
    """Write a graph as readable Python with shapes and the user's lines, and texts that belong to the same step."""
    if active():
        step(name, {"_graph.py": gm.print_readable(print_output=False), **(texts or {})})


def kernel(folder: str | None, name: str, source: str) -> None:
    """Write the source of a generated kernel; kernels may be made later than the steps, at the first call."""
    if folder:
        path = Path(folder).expanduser() / "kernels"
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(source, encoding="utf-8")
