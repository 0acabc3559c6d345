"""Object stores by URL: their connections, how long they are asked again, and files on them.

Label datasets go through ``folder``, sources of a corpus through ``Files``; both are patient
with a store that fails by the same rule.
"""

from __future__ import annotations

import functools
import io
import random
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from journeyman.errors import DataError, RecipeError

T = TypeVar("T")

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss")
_PATIENCE_S = 60.0  # with a store that fails or cannot be reached, each request
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_READ_BYTES = 8 << 20


@functools.cache
def connect(url: str) -> Any:
    """One store, with its connections, for each URL and process; raises RecipeError."""
    from obstore.exceptions import BaseError
    from obstore.store import MemoryStore, from_url

    if "?" in url or "#" in url:
        raise RecipeError(
            f"{url}: a URL with ? or #, behind which an object store's URL has no folder; take "
            "another name."
        )
    try:
        if url.startswith("memory:"):
            return MemoryStore()
        return from_url(url, retry_config=_retries())
    except (BaseError, ValueError) as error:
        raise RecipeError(
            f"{url}: no such object store ({str(error).splitlines()[0]}); take a folder, or a URL "
            "of s3://, gs:// or az:// with what it needs in the environment."
        ) from error


def patiently(ask: Callable[[], T]) -> T:
    """What ``ask`` returns, asking again while the store fails, for a minute.

    obstore asks again by itself, but not where an answer breaks off after it has begun.
    """
    from obstore.exceptions import GenericError

    deadline, pause = time.monotonic() + _PATIENCE_S, _FIRST_PAUSE_S
    while True:
        try:
            return ask()
        except GenericError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class Files:
    """As much of an fsspec file system as reading a corpus takes. Paths are bucket/key."""

    def __init__(self, protocol: str) -> None:
        from obstore.fsspec import FsspecStore

        self._protocol = protocol
        self._files = FsspecStore(protocol, retry_config=_retries())

    def glob(self, path: str) -> list[str]:
        return self._asked(path, lambda: self._files.glob(path))

    def exists(self, path: str) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def info(self, path: str) -> dict[str, Any]:
        return self._asked(path, lambda: self._files.info(path))

    def unstrip_protocol(self, path: str) -> str:
        return f"{self._protocol}://{path}"

    def open(self, path: str) -> io.BufferedReader:
        size = self.info(path)["size"]
        bucket, _, key = path.partition("/")
        store = connect(self.unstrip_protocol(bucket))

        def read(start: int, end: int) -> Any:
            import obstore

            return self._asked(path, lambda: obstore.get_range(store, key, start=start, end=end))

        return io.BufferedReader(_Ranges(read, size), _READ_BYTES)

    def _asked(self, path: str, ask: Callable[[], T]) -> T:
        from obstore.exceptions import BaseError

        try:
            return patiently(ask)
        except FileNotFoundError:
            raise
        except BaseError as error:
            raise DataError(
                f"{self.unstrip_protocol(path)}: cannot be read ({str(error).splitlines()[0]}); "
                "mend that and run the same command again."
            ) from error


class _Ranges(io.RawIOBase):
    """A file of which each piece is a request of its own."""

    def __init__(self, read: Callable[[int, int], Any], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        got = memoryview(self._read(self._at, end))
        buffer[: len(got)] = got
        self._at += len(got)
        return len(got)


def _retries() -> dict[str, Any]:
    return {"max_retries": 1000, "retry_timeout": timedelta(seconds=_PATIENCE_S)}
