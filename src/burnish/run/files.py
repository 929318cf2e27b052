"""Files that hold what was written, whatever happens: written aside, fsynced and renamed; logs that grow line by line; hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from burnish.errors import DataError, disk_errors


def write_whole(path: Path, content: bytes) -> None:
    """Write aside, fsync, rename, fsync the folder: the name holds the old file or the whole new one, never a part."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
        fsync_folder(path.parent)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside, fsync what is in it, rename it into place. On any failure nothing is left."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            fsync_folder(aside)
            os.chmod(aside, 0o755)
            if path.exists():
                old = path.with_name(f".{path.name}.old")
                os.replace(path, old)
                try:
                    os.replace(aside, path)
                except OSError:
                    os.replace(old, path)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        fsync_folder(path.parent)


def recover_folder(path: Path) -> None:
    """Tidy up after a process that died in `write_folder`: put the old folder back, remove what was being filled.

    Only for the one process that writes here (a run's or the cache's lock is held).
    """
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    for left in (old, *path.parent.glob(f".{path.name}.*.tmp")):
        shutil.rmtree(left, ignore_errors=True)


def is_aside(path: Path) -> bool:
    """Whether `write_whole` or `write_folder` gave it its name: .NAME.8 random characters.tmp"""
    return re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp", path.name) is not None


def append_line(path: Path, row: Mapping[str, Any], *, sync: bool = False) -> None:
    """Append one JSON line (`sync`: and have it on the disk). A reader ignores a last line that a crash cut short (`read_lines`)."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        # A line cut short by a crash must not swallow the next one.
        torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(("\n" if torn else "") + line)
            if sync:
                file.flush()
                os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file this package wrote line by line; a line cut short by a crash is left out, so its work is done again."""
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """So many bytes of an open file, wherever it stands. DataError where it has been cut since it was opened."""
    found = os.pread(file.fileno(), size, start)
    if len(found) != size:
        raise DataError(f"{file.name}: {size} bytes expected at {start}, {len(found)} are there: the file was changed while it was in use")
    return found


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_of(*parts: Any) -> str:
    """16 hex digits over JSON values: the same content gives the same hash on every machine."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()[
        :16
    ]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
