"""Bytes under names, in a local folder or behind an object store's URL, by one and the same path.

A name holds all of its bytes or does not exist. ``create`` is the only arbiter between writers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from journeyman import files, object_store
from journeyman.errors import ClusterError

T = TypeVar("T")

_PAGE = 1000  # names of a listing that are in memory
_PIECE = 16 << 20  # bytes of a large file that go at a time
_MOST_PIECES = 9_000  # S3 takes 10,000
_READERS = 32  # reads at a time
_READ_AHEAD = 1024  # files that are read before the first of them is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One name of a folder."""

    name: str
    size: int
    modified: datetime
    tag: str  # changes when the content does


class Folder:
    """A folder at a path or at a URL that obstore knows (s3://, gs://, az://, file://, memory://).

    Holds no connection of its own, so it may be pickled. What the disk or the store refuses is a
    ClusterError; a name that does not exist is a FileNotFoundError.
    """

    def __init__(self, where: str | Path) -> None:
        """Raises RecipeError for a URL of an unknown kind."""
        self.where = str(where)
        self.directory = _local(self.where)  # None behind a URL
        if self.directory is None:
            object_store.connect(self.where)

    @property
    def everywhere(self) -> str:
        """The same for processes with another working directory."""
        return self.where if self.directory is None else str(self.directory.resolve())

    def path(self, name: str) -> str:
        """A name as people write it."""
        return f"{self.where.rstrip('/')}/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write, in place of what is there."""
        self._put(name, content, "overwrite")

    def create(self, name: str, content: bytes) -> bool:
        """Write only if the name does not exist; False if it does."""
        from obstore.exceptions import AlreadyExistsError

        try:
            self._put(name, content, "create")
        except AlreadyExistsError:
            return False
        return True

    def put_file(self, name: str, source: Path) -> None:
        """Write a file's content, in place of what is there; a large one goes in pieces."""
        import obstore

        size = source.stat().st_size
        piece = max(_PIECE, -(-size // _MOST_PIECES))
        with self._errors(name, "written"):
            self._asked(
                lambda: obstore.put(
                    self._store(), name, source, use_multipart=size > piece, chunk_size=piece
                )
            )

    def get_file(self, name: str, target: Path, size: int) -> None:
        """Write so many bytes of a name into a file, in pieces."""
        import obstore

        with files.disk_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for start in range(0, size, _PIECE):
                    end = min(size, start + _PIECE)
                    ask = partial(obstore.get_range, self._store(), name, start=start, end=end)
                    with self._errors(name, "read"):
                        piece = self._asked(ask)
                    file.write(piece)

    def has(self, name: str) -> bool:
        import obstore

        if self.directory is not None and not self.directory.is_dir():
            return False
        try:
            with self._errors(name, "read"):
                self._asked(lambda: obstore.head(self._store(), name))
        except FileNotFoundError:
            return False
        return True

    def get(self, name: str) -> bytes:
        import obstore

        if self.directory is not None and not self.directory.is_dir():
            raise FileNotFoundError(self.path(name))
        with self._errors(name, "read"):
            return self._asked(lambda: bytes(obstore.get(self._store(), name).bytes()))

    def get_each(
        self, names: Iterable[str], ahead: int = _READ_AHEAD
    ) -> Iterator[tuple[str, bytes | None]]:
        """Names and contents in the order asked for, None for a name that does not exist.

        Up to ``ahead`` contents are in memory.
        """
        waiting = iter(names)
        with ThreadPoolExecutor(_READERS) as readers:
            while batch := list(itertools.islice(waiting, ahead)):
                yield from zip(batch, readers.map(self._get_if_there, batch), strict=True)

    def _get_if_there(self, name: str) -> bytes | None:
        try:
            return self.get(name)
        except FileNotFoundError:
            return None

    def walk(self, prefix: str) -> Iterator[Listed]:
        """All names below a prefix, in no order; none if there is no such folder."""
        if self.directory is not None and not self.directory.is_dir():
            return
        with self._errors(prefix, "listed"):
            for page in self._pages(prefix):
                for item in page:
                    yield Listed(
                        name=item["path"],
                        size=item["size"],
                        modified=item["last_modified"],
                        tag=item["e_tag"] or item["last_modified"].isoformat(),
                    )

    def folders(self) -> list[str]:
        """The names of the folders right below that hold something."""
        import obstore

        if self.directory is not None and not self.directory.is_dir():
            return []
        with self._errors("", "listed"):
            listed = self._asked(lambda: obstore.list_with_delimiter(self._store()))
        return list(listed["common_prefixes"])

    def _pages(self, prefix: str) -> Iterator[Sequence[Any]]:
        """Once a page has failed, those behind the last one that came are asked for."""
        import obstore
        from obstore.exceptions import GenericError

        listed: Iterator[Sequence[Any]] | None = None
        last: str | None = None

        def next_page() -> Sequence[Any] | None:
            nonlocal listed
            listed = listed or iter(
                obstore.list(self._store(), prefix, offset=last, chunk_size=_PAGE)
            )
            try:
                return next(listed, None)
            except GenericError:
                listed = None
                raise

        while (page := self._asked(next_page)) is not None:
            yield page
            last = page[-1]["path"] if page else last

    def delete(self, name: str) -> None:
        """Fine with a name that does not exist."""
        import obstore

        if self.directory is not None and not self.directory.is_dir():
            return
        with contextlib.suppress(FileNotFoundError), self._errors(name, "deleted"):
            self._asked(lambda: obstore.delete(self._store(), name))

    def delete_unfinished(self, older_than_s: float) -> None:
        """Remove what killed writers left of local files; an object store has no such thing."""
        if self.directory is None:
            return
        for path in self.directory.rglob("*#*"):  # obstore's name for them
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - older_than_s:
                    path.unlink()

    def _put(self, name: str, content: bytes, mode: str) -> None:
        import obstore

        with self._errors(name, "written"):
            if self.directory is not None:
                self.directory.mkdir(parents=True, exist_ok=True)
            self._asked(lambda: obstore.put(self._store(), name, content, mode=mode))
            if self.directory is not None:
                _sync(self.directory / name)

    def _asked(self, ask: Callable[[], T]) -> T:
        """A disk that fails once has no second chance: it is full, or damaged."""
        return ask() if self.directory is not None else object_store.patiently(ask)

    def _store(self) -> Any:
        from obstore.store import LocalStore

        if self.directory is None:
            return object_store.connect(self.where)
        return LocalStore(self.directory)

    @contextlib.contextmanager
    def _errors(self, name: str, verb: str) -> Iterator[None]:
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            with files.disk_errors(Path(self.where)):
                yield
        except AlreadyExistsError:
            raise
        except FileNotFoundError as error:
            if verb != "written" or self.directory is not None:
                raise
            raise ClusterError(
                f"{self.where}: cannot be written: there is no such bucket; name one that is "
                "there, or make it."
            ) from error
        except BaseError as error:  # obstore's own, for a full disk as for a lost store
            reason = str(error).splitlines()[0]
            raise ClusterError(
                f"{self.path(name)}: cannot be {verb} ({reason}); mend that and run the same "
                "command again: it goes on where it stopped."
            ) from error


def _local(where: str) -> Path | None:
    if "://" not in where:
        return Path(where)
    url = urlsplit(where)
    return Path(unquote(url.path)) if url.scheme == "file" else None


def _sync(path: Path) -> None:
    """The commit must not reach the disk before the data that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
