"""A folder that lies behind an object store's URL, with a copy on each node that uses it.

Models and checkpoints are read and written by libraries that want files: they get the copy. In the
store a list of the files with their digests is put last and taken away first: a folder without it
is being written, or was cut short, and counts as none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from journeyman import files
from journeyman.errors import DataError
from journeyman.folder import Folder

LIST = ".files.json"
_MANIFEST = "manifest.json"  # by which a corpus is known to those who read it where it lies


def copy_of(url: str) -> Path:
    """Where this node keeps what it writes of what is behind a URL."""
    return _cached("runs", url)


def reading_copy_of(url: str) -> Path:
    """Where this node has a copy for those who only read, who must not take the place of what is
    being written."""
    return _cached("copies", url)


def _cached(kind: str, url: str) -> Path:
    url = url.rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return (files.cache() / kind / digest / url.rpartition("/")[2]).absolute()


_Listed = dict[str, list[int | str]]  # bytes and SHA-256 of each file, by its path in the folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """local: the folder on this node, an absolute path; url: where it lies, None where the local
    one is all there is, on a disk that all nodes share. May be pickled."""

    local: Path
    url: str | None = None

    def below(self, name: str) -> Mirror:
        """A folder in this one, which is in no list of it."""
        return Mirror(local=self.local / name, url=self.url and f"{self.url}/{name}")

    def push(self) -> None:
        """Have the store hold what the copy does, and nothing else; raises ClusterError."""
        if self.url is None:
            return
        folder = Folder(self.url)
        with alone(self.local):
            listed = _listed(self.local)
            before = _in_store(folder)
            if before != listed:
                self._put(folder, listed, before or {})
            files.write_json(self.local / LIST, listed)

    def _put(self, folder: Folder, listed: _Listed, before: _Listed) -> None:
        folder.delete(LIST)
        if before.get(_MANIFEST) != listed.get(_MANIFEST):
            folder.delete(_MANIFEST)
            before = before | {_MANIFEST: []}
        for name in sorted(listed, key=lambda name: name == _MANIFEST):
            if before.get(name) != listed[name]:
                folder.put_file(name, self.local / name)
        for found in [found.name for found in folder.walk("")]:
            if found not in listed:
                folder.delete(found)
        folder.put(LIST, json.dumps(listed, indent=1).encode())

    def pull(self) -> bool:
        """Have the copy hold what the store does; False where there is no such folder, and then
        there is no copy either. Raises ClusterError, and DataError where files change meanwhile.
        """
        if self.url is None:
            return self.local.is_dir()
        folder = Folder(self.url)
        with alone(self.local):
            listed = _in_store(folder)
            if listed is not None and _in_copy(self.local) == listed:
                return True
            shutil.rmtree(self.local, ignore_errors=True)
            if listed is None:
                return False
            with files.scratch_folder(self.local) as fresh:
                for name, (size, digest) in listed.items():
                    with contextlib.suppress(FileNotFoundError):
                        folder.get_file(name, fresh / name, int(size))
                        if files.file_digest(fresh / name) == digest:
                            continue
                    raise DataError(
                        f"{folder.path(name)}: is being written, or damaged; run the same "
                        "command again, and if it stays so, the step that writes it."
                    )
                files.write_json(fresh / LIST, listed)
                fresh.rename(self.local)
        return True

    def remove(self) -> None:
        """Both, where there is a store; a folder on a shared disk, too."""
        if self.url is not None:
            folder = Folder(self.url)
            for name in [found.name for found in folder.walk("")]:
                folder.delete(name)
        shutil.rmtree(self.local, ignore_errors=True)


def _listed(local: Path) -> _Listed:
    found = sorted(path for path in local.rglob("*") if path.is_file())
    return {
        str(path.relative_to(local)): [path.stat().st_size, files.file_digest(path)]
        for path in found
        if path.name != LIST
    }


def _in_store(folder: Folder) -> _Listed | None:
    try:
        content: _Listed = json.loads(folder.get(LIST))
    except FileNotFoundError:
        return None
    return content


def _in_copy(local: Path) -> _Listed | None:
    """What the copy was when it was made, unless a file of it is gone or of another size since."""
    try:
        listed: _Listed = files.read_json(local / LIST)
        whole = all((local / name).stat().st_size == size for name, (size, _) in listed.items())
    except (DataError, OSError):
        return None
    return listed if whole else None


@contextlib.contextmanager
def alone(local: Path) -> Iterator[None]:
    """One process of a node makes the copy; the others wait for it."""
    with files.disk_errors(local.parent):
        local.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(local.with_name(f".{local.name}.lock"), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
