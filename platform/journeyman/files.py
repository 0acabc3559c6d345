"""Files that are written whole or not at all, and digests of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from journeyman.errors import ClusterError, DataError, JourneymanError

_CHUNK = 1 << 20


def cache() -> Path:
    """``$JOURNEYMAN_CACHE``, else ``~/.cache/journeyman``: what can be had again."""
    return Path(os.environ.get("JOURNEYMAN_CACHE", "~/.cache/journeyman")).expanduser()


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder or a missing right into a sentence."""
    try:
        yield
    except JourneymanError:  # it says itself what is wrong, and on which machine
        raise
    except Exception as error:
        if _is_full(error):
            raise ClusterError(
                f"{where}: the disk is full; free some space there and run the same command "
                "again: it goes on where it stopped."
            ) from error
        refused = (errno.EACCES, errno.EPERM, errno.EROFS)
        if isinstance(error, OSError) and error.errno in refused:
            raise ClusterError(f"{where}: cannot be written ({error.strerror}).") from error
        raise


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Of libraries that are not written in Python, such as safetensors.
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def write_bytes(path: Path, content: bytes) -> None:
    """Write through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Have a folder's files on the disk, before a name says that they are whole."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    write_bytes(path, as_json(value))


def read_json(path: Path) -> Any:
    """Raises DataError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; run the step that writes it first.") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged, not JSON ({error}); remove it and run again.") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file with one JSON object a line; raises DataError if it is missing."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; run the step that writes it first.") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


@contextlib.contextmanager
def scratch_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside ``final``, removed when the block ends; to be renamed before.

    What killed processes left of such folders is removed first. Who has one holds a shared lock on
    the parent for as long as it lives: whoever gets that lock alone knows the others to be dead.
    """
    fresh = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # others hold it, or the disk has no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in final.parent.glob(f".{final.name}.*.tmp"):
                    shutil.rmtree(left, ignore_errors=True)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            fresh.mkdir()
            yield fresh
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            os.close(descriptor)


@contextlib.contextmanager
def replaced_directory(final: Path) -> Iterator[Path]:
    """A fresh folder beside ``final`` that takes its place when the block ends well.

    The folder it replaces is kept as ``NAME.old`` until the next time; after an error
    ``final`` is as it was.
    """
    with scratch_folder(final) as fresh:
        yield fresh
        set_aside(final)
        fresh.rename(final)


def set_aside(directory: Path) -> None:
    """Move a folder, where there is one, to ``NAME.old``, in place of any older one."""
    if directory.exists():
        old = directory.with_name(directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
