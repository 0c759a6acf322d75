"""A cache that is attacked, damaged, full, and shared."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from attnopt.errors import CacheError
from attnopt.runtime.cache import Cache

KEY = "a" * 64
OTHER = "b" * 64


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def stored(cache: Cache, tmp_path: Path, key: str = KEY) -> Path:
    library = tmp_path / "made.so"
    library.write_bytes(b"\x7fELF" + key.encode())
    return cache.put(key, "int x;", library, {"compiler": "g++"})


def test_round_trip_and_private_mode(cache: Cache, tmp_path: Path) -> None:
    assert cache.get(KEY) is None
    path = stored(cache, tmp_path)
    assert cache.get(KEY) == path
    assert path.read_bytes().startswith(b"\x7fELF")
    assert cache.path.stat().st_mode & 0o777 == 0o700
    assert [entry.manifest["compiler"] for entry in cache.entries()] == ["g++"]
    assert cache.verify() == {KEY: None}


@pytest.mark.parametrize("suffix", [".so", ".cpp"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"", lambda b: b[:-1] + b"\x00"])
def test_damaged_files_are_dropped(cache: Cache, tmp_path: Path, suffix: str, damage: object) -> None:
    stored(cache, tmp_path)
    file = cache.file(KEY, suffix)
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert "altered or truncated" in str(cache.verify()[KEY])
    assert cache.get(KEY) is None
    assert cache.keys() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "other"}', '{"key": 1, "sha256": {}}'])
def test_damaged_manifests_are_dropped(cache: Cache, tmp_path: Path, text: str) -> None:
    stored(cache, tmp_path)
    cache.file(KEY, ".json").write_text(text)
    assert cache.get(KEY) is None


def test_an_entry_that_others_can_write_or_a_link_is_not_used(cache: Cache, tmp_path: Path) -> None:
    stored(cache, tmp_path).chmod(0o666)
    assert cache.get(KEY) is None
    elsewhere = stored(cache, tmp_path).rename(tmp_path / "elsewhere.so")
    cache.file(KEY, ".so").symlink_to(elsewhere)
    assert cache.get(KEY) is None


def test_a_manifest_of_another_entry_is_not_used(cache: Cache, tmp_path: Path) -> None:
    stored(cache, tmp_path)
    for suffix in (".so", ".cpp", ".json"):
        cache.file(KEY, suffix).rename(cache.file(OTHER, suffix))
    assert cache.get(OTHER) is None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CacheError, match="can be written by others"):
        Cache(folder)


def test_a_folder_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(tmp_path / "mine")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match="belongs to another user"):
        Cache(tmp_path / "mine")


def test_a_linked_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="symbolic link"):
        Cache(tmp_path / "link")
    with pytest.raises(CacheError, match="expected kind"):
        Cache(tmp_path / "file")
    with pytest.raises(CacheError, match="cannot be made"):
        Cache(tmp_path / "file" / "below")


def test_keys_cannot_leave_the_folder(cache: Cache) -> None:
    with pytest.raises(CacheError, match="64 hexadecimal"):
        cache.get("../../etc/passwd")


def test_a_full_disk_leaves_nothing_behind(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        stored(cache, tmp_path)
    assert list(cache.path.iterdir()) == []


def test_lock_gives_up_in_time(cache: Cache) -> None:
    holder = (
        "import sys, pathlib; from attnopt.runtime.cache import Cache\n"
        "with Cache(pathlib.Path(sys.argv[1])).lock('a' * 64, 5): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(cache.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(CacheError, match="held the lock"), cache.lock(KEY, 0.2):
            pass
        process.communicate("")
    with cache.lock(KEY, 0.2):
        assert cache.file(KEY, ".lock").exists()


def test_clear_and_export(cache: Cache, tmp_path: Path) -> None:
    stored(cache, tmp_path)
    stored(cache, tmp_path, OTHER)
    cache.file(OTHER, ".so").write_bytes(b"altered")
    assert cache.export(tmp_path / "kernels.tar.gz") == 1
    with tarfile.open(tmp_path / "kernels.tar.gz") as tar:
        assert sorted(tar.getnames()) == [f"{KEY}.cpp", f"{KEY}.json", f"{KEY}.so"]
    assert cache.clear() == 2
    assert list(cache.path.iterdir()) == []


def test_notes_are_kept_checked_and_cleared(cache: Cache) -> None:
    assert cache.note(KEY) is None
    cache.put_note(KEY, {"plan": [1, 2]})
    assert cache.note(KEY) == {"plan": [1, 2]}
    assert cache.keys() == []
    path = cache.file(KEY, ".note")
    assert path.stat().st_mode & 0o077 == 0
    other = "b" * 64
    cache.file(other, ".note").write_bytes(path.read_bytes())
    cache.file(other, ".note").chmod(0o600)
    assert cache.note(other) is None
    assert not cache.file(other, ".note").exists()
    path.write_text(path.read_text().replace("1, 2", "1, 3"))
    assert cache.note(KEY) is None
    cache.put_note(KEY, {})
    cache.clear()
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 1, "about": 2, "sha256": 3}'])
def test_damaged_notes_are_dropped(cache: Cache, text: str) -> None:
    path = cache.file(KEY, ".note")
    path.write_text(text)
    path.chmod(0o600)
    assert cache.note(KEY) is None
    assert not path.exists()
