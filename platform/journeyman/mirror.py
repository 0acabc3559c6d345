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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from journeyman import files
from journeyman.errors import DataError
from journeyman.folder import Folder

LIST = ".files.json"
_MANIFEST = "manifest.json"  # by which a corpus is known to those who read it where it lies
_AT_ONCE = 16  # files: of small ones the store's answer is what takes the time
_LARGE = 16 << 20  # bytes of a file that ``Folder`` sends in pieces


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
        changed = [name for name in listed if before.get(name) != listed[name]]
        self._put_files(folder, {n: int(listed[n][0]) for n in changed if n != _MANIFEST})
        if _MANIFEST in changed:
            folder.put_file(_MANIFEST, self.local / _MANIFEST)
        _delete(folder, [found.name for found in folder.walk("") if found.name not in listed])
        folder.put(LIST, json.dumps(listed, indent=1).encode())

    def _put_files(self, folder: Folder, sizes: dict[str, int]) -> None:
        """A large file's pieces go at once and are held in memory: one such file at a time."""

        def put(name: str) -> None:
            folder.put_file(name, self.local / name)

        for name, size in sizes.items():
            if size > _LARGE:
                put(name)
        _each(put, [name for name, size in sizes.items() if size <= _LARGE])

    def write(self, name: str, content: bytes) -> None:
        """Exchange one file, here and in the store; raises ClusterError, and then the copy is
        fetched again before it is used."""
        (self.local / LIST).unlink(missing_ok=True)
        files.write_bytes(self.local / name, content)
        self.push()

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
                _each(partial(_fetch, folder, listed, fresh), listed)
                files.write_json(fresh / LIST, listed)
                fresh.rename(self.local)
        return True

    def remove(self) -> None:
        """Both, where there is a store; a folder on a shared disk, too."""
        if self.url is not None:
            folder = Folder(self.url)
            folder.delete(LIST)
            _delete(folder, [found.name for found in folder.walk("")])
        shutil.rmtree(self.local, ignore_errors=True)


def _listed(local: Path) -> _Listed:
    found = sorted(path for path in local.rglob("*") if path.is_file())
    return {
        str(path.relative_to(local)): [path.stat().st_size, files.file_digest(path)]
        for path in found
        if path.name != LIST
    }


def _fetch(folder: Folder, listed: _Listed, fresh: Path, name: str) -> None:
    size, digest = listed[name]
    with contextlib.suppress(FileNotFoundError):
        folder.get_file(name, fresh / name, int(size))
        if files.file_digest(fresh / name) == digest:
            return
    raise DataError(
        f"{folder.path(name)}: is being written, or damaged; run the same command again, and if it "
        "stays so, the step that writes it."
    )


def _delete(folder: Folder, names: Iterable[str]) -> None:
    _each(folder.delete, names)


def _each(do: Callable[[str], None], names: Iterable[str]) -> None:
    """Several at a time; after the first error, which is raised, no more are begun."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running: set[Future[None]] = set()
        for name in names:
            if len(running) == _AT_ONCE:
                running = _ended(running)
            running.add(pool.submit(do, name))
        while running:
            running = _ended(running)


def _ended(running: set[Future[None]]) -> set[Future[None]]:
    """Wait for one at least; returns those that go on."""
    done, going_on = wait(running, return_when=FIRST_COMPLETED)
    for each in done:
        each.result()
    return going_on


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
