"""Compiled kernels on disk: private, atomic, verified, locked. Nothing in it is trusted unless every check holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import filelock

from attnopt.errors import CacheError

_KEY = re.compile(r"[0-9a-f]{64}")
_SUFFIXES = (".so", ".cpp", ".json")
# A note is one file that says something of its key, such as the fastest schedule.
_NOTE = ".note"


@dataclass(frozen=True)
class Entry:
    """One kernel of the cache: its key, size in bytes, time of creation, and what its manifest says."""

    key: str
    size: int
    created: float
    manifest: Mapping[str, object]


class Cache:
    """A folder of compiled kernels, three files each: `<key>.cpp`, `<key>.so` and the manifest `<key>.json`.

    The folder is made with mode 0700. `CacheError` is raised for one that belongs to another user, that others
    can write to, or that is a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            found = os.lstat(path)
        except OSError as error:
            raise CacheError(f"the cache folder {path} cannot be made: {error.strerror or error}. {_ADVICE}") from error
        problem = _unsafe(found, stat.S_ISDIR)
        if problem:
            raise CacheError(f"the cache folder {path} {problem}, so its kernels cannot be trusted. {_ADVICE}")
        if not os.access(path, os.W_OK | os.X_OK):
            raise CacheError(f"the cache folder {path} cannot be written. {_ADVICE}")

    def file(self, key: str, suffix: str) -> Path:
        """Where the entry's file of this suffix is or would be."""
        if not _KEY.fullmatch(key) or suffix not in (*_SUFFIXES, _NOTE, ".lock"):
            raise CacheError(f"a cache key is 64 hexadecimal digits, not {key!r}.")
        return self.path / f"{key}{suffix}"

    def get(self, key: str) -> Path | None:
        """The verified library of this key; None if there is none or it fails a check (then it is removed)."""
        problem = self.problem(key)
        if problem is None:
            return self.file(key, ".so")
        if any(self.file(key, suffix).exists() for suffix in _SUFFIXES):
            self.remove(key)
        return None

    def problem(self, key: str) -> str | None:
        """Why the entry cannot be used, or None if every check holds."""
        try:
            manifest = json.loads(self._read(key, ".json"))
            digests = manifest["sha256"]
            if manifest["key"] != key:
                return "the manifest is of another entry"
            for suffix in (".so", ".cpp"):
                if hashlib.sha256(self._read(key, suffix)).hexdigest() != digests[suffix]:
                    return f"the {suffix} file was altered or truncated"
        except CacheError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        except (ValueError, KeyError, TypeError):
            return "the manifest is malformed"
        return None

    def _read(self, key: str, suffix: str) -> bytes:
        """The file's bytes, if it is a plain file that only its owner, this user, can write."""
        path = self.file(key, suffix)
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            problem = _unsafe(os.fstat(file.fileno()), stat.S_ISREG)
            if problem:
                raise CacheError(f"the {suffix} file {problem}")
            return file.read()

    def put(self, key: str, source: str, library: Path, about: Mapping[str, object]) -> Path:
        """Store a library with its source. Each file is written beside its place and renamed; the manifest comes last.

        Raises `OSError` if the disk does not take it; then nothing is stored.
        """
        parts = {".cpp": source.encode(), ".so": library.read_bytes()}
        digests = {suffix: hashlib.sha256(data).hexdigest() for suffix, data in parts.items()}
        manifest = {**about, "key": key, "created": time.time(), "sha256": digests}
        parts[".json"] = json.dumps(manifest, indent=1, sort_keys=True).encode()
        for suffix, data in parts.items():
            self._write(self.file(key, suffix), data)
        return self.file(key, ".so")

    def put_note(self, key: str, about: Mapping[str, object]) -> None:
        """Keep a note, which has to be JSON. Raises `OSError` if the disk does not take it."""
        text = json.dumps(about, sort_keys=True)
        note = {"key": key, "about": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        self._write(self.file(key, _NOTE), json.dumps(note).encode())

    def note(self, key: str) -> Mapping[str, object] | None:
        """The note of this key; None if there is none or it fails a check (then it is removed)."""
        try:
            note = json.loads(self._read(key, _NOTE))
            if note["key"] == key and hashlib.sha256(note["about"].encode()).hexdigest() == note["sha256"]:
                about = json.loads(note["about"])
                if isinstance(about, dict):
                    return about
        except FileNotFoundError:
            return None
        except (CacheError, OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        with contextlib.suppress(OSError):
            self.file(key, _NOTE).unlink(missing_ok=True)
        return None

    def _write(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(prefix=".new-", dir=self.path)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    @contextlib.contextmanager
    def lock(self, key: str, timeout: float) -> Iterator[None]:
        """Hold the entry's lock. Raises `CacheError` if another process keeps it longer than `timeout` seconds."""
        lock = filelock.FileLock(self.file(key, ".lock"), timeout=timeout, mode=0o600)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise CacheError(
                f"another process held the lock of {key[:12]} in {self.path} for more than {timeout:g} s; end it, or "
                f"raise Options(lock_timeout=...)."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def keys(self) -> list[str]:
        """The keys of everything stored, whole or not."""
        return sorted({p.stem for p in self.path.iterdir() if p.suffix in _SUFFIXES and _KEY.fullmatch(p.stem)})

    def entries(self) -> list[Entry]:
        """The entries with a readable manifest, oldest first."""
        found = []
        for key in self.keys():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CacheError):
                manifest = json.loads(self._read(key, ".json"))
                size = sum(self.file(key, suffix).stat().st_size for suffix in _SUFFIXES)
                found.append(Entry(key, size, float(manifest["created"]), manifest))
        return sorted(found, key=lambda entry: entry.created)

    def verify(self) -> dict[str, str | None]:
        """For each key, what is wrong with its entry, or None."""
        return {key: self.problem(key) for key in self.keys()}

    def remove(self, key: str) -> None:
        """Remove an entry's files; the manifest first, so that no half of an entry looks whole."""
        for suffix in reversed(_SUFFIXES):
            self.file(key, suffix).unlink(missing_ok=True)

    def clear(self) -> int:
        """Remove every entry and what interrupted writes left; returns how many entries there were."""
        keys = self.keys()
        for key in keys:
            self.remove(key)
        for path in (*self.path.glob(f"*{_NOTE}"), *self.path.glob("*.lock"), *self.path.glob(".new-*")):
            path.unlink(missing_ok=True)
        return len(keys)

    def export(self, archive: Path) -> int:
        """Write the entries that pass every check to a `.tar.gz`; returns how many."""
        whole = [key for key, problem in self.verify().items() if problem is None]
        with tarfile.open(archive, "w:gz") as tar:
            for key in whole:
                for suffix in _SUFFIXES:
                    tar.add(self.file(key, suffix), arcname=f"{key}{suffix}", recursive=False)
        return len(whole)


_ADVICE = "Set ATTNOPT_CACHE_DIR or Options(cache_dir=...) to a folder of your own."


def _unsafe(found: os.stat_result, kind: object) -> str | None:
    """Why a file or folder must not be trusted, or None."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not kind(found.st_mode):  # type: ignore[operator]
        return "is not of the expected kind"
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def entry_key(*parts: str) -> str:
    """sha256 over the parts that decide what a compiled kernel is."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
