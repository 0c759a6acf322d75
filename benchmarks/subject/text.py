"""The text the subject learns: the Python standard library, split into training and held-out files by their names."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests repeat themselves; encodings and pydoc_data are tables and help texts, not code.
LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"})
LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 0.05  # the share of the files that training never sees
SEPARATOR = b"\x00"  # between files


@dataclass(frozen=True)
class Text:
    """Both halves as bytes, and what identifies them."""

    train: bytes
    heldout: bytes
    files: int
    fingerprint: str
    python: str


def is_heldout(name: str) -> bool:
    """Whether the file of this name, relative to the library's folder, is held out: a property of the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < HELD_OUT * 2**32


def stdlib(root: Path | None = None) -> Text:
    """The library's text, files in order of their names, joined by a zero byte."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = [p.relative_to(root) for p in root.rglob("*.py")]
    names = sorted((n for n in names if not LEFT_OUT.intersection(n.parts)), key=lambda n: n.as_posix())
    halves: tuple[list[bytes], list[bytes]] = ([], [])
    for name in names:
        halves[is_heldout(name.as_posix())].append((root / name).read_bytes())
    train, heldout = (SEPARATOR.join(half) for half in halves)
    fingerprint = hashlib.sha256(train + SEPARATOR + SEPARATOR + heldout).hexdigest()
    return Text(train, heldout, len(names), fingerprint, platform.python_version())
