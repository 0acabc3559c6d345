"""What a teacher has said of a row, by how it was asked: rows labeled in any dataset, to copy.

    <cache>/<digest of the identity without its corpus>/<SHA-256>.parquet   rows of a label dataset
    <cache>/<digest of the identity without its corpus>/<SHA-256>.ids       their ids, 16 bytes each

The ids are written last. A run needs nothing of this: what is damaged or cannot be reached is
passed over with a warning, and its rows are labeled anew.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import ClusterError
from journeyman.folder import Folder
from journeyman.labels.parquet import parquet_bytes, parquet_table
from journeyman.labels.schema import SCHEMA_VERSION, Commit, label_schema
from journeyman.labels.store import in_order
from journeyman.recipe import digest

if TYPE_CHECKING:
    import pyarrow as pa

_ID_BYTES = 16
_TABLES = 8  # data files in memory: those read at a time, and those kept for the next lookup
_log = logging.getLogger(__name__)


def how_asked(identity: dict[str, Any]) -> str:
    """Digest of what decides how a teacher labels a row: the identity of a dataset, but for its
    corpus. Of two datasets with the same one, either may copy rows from the other."""
    asked = {name: value for name, value in in_order(identity).items() if name != "corpus"}
    return digest([SCHEMA_VERSION, asked])


class Cache:
    """Rows labeled under one identity. May be used by several threads."""

    def __init__(
        self, where: str | Path, identity: dict[str, Any], only_read: bool = False
    ) -> None:
        """Reads nothing yet; raises RecipeError for a URL of an unknown kind. only_read: ``add``
        keeps nothing."""
        self._only_read = only_read
        self._below = how_asked(identity)
        self._schema = label_schema(identity["kind"])
        self._folder = Folder(where)
        self._lock = threading.Lock()
        self._loaded = False
        self._files: list[str] = []  # SHA-256 of the data files whose ids have been read
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()  # the last used at the end
        # For each row there is: the first half of its id, and its file's place in _files; sorted.
        self._halves = np.empty(0, dtype=np.uint64)
        self._places = np.empty(0, dtype=np.uint32)

    def lookup(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Records of ``label_schema`` for those of the ids that were labeled before.

        split and gold are those of the corpus that they were labeled in.
        """
        with self._lock:
            self._load()
            found: dict[str, dict[str, Any]] = {}
            candidates = self._candidates(ids)
            places = list(candidates)
            for start in range(0, len(places), _TABLES):
                some = places[start : start + _TABLES]
                for place, table in self._read([p for p in some if candidates[p] - found.keys()]):
                    found.update(_rows(table, list(candidates[place])))
            return found

    def add(self, commit: Commit, labels: pa.Table) -> None:
        """Keep the rows of a committed shard that are not here yet."""
        if commit.copied < commit.ok and not self._only_read:
            self.keep(labels)

    def keep(self, labels: pa.Table) -> None:
        """The same of any rows of ``label_schema``, each id once."""
        with self._lock:
            self._load()
            halves = _halves(labels["id"].to_pylist())
            left, right = self._range(halves)
        fresh = labels.filter(left == right)
        if not len(fresh):
            return
        content = parquet_bytes(fresh)
        name = f"{self._below}/{hashlib.sha256(content).hexdigest()}"
        ids = bytes.fromhex("".join(fresh["id"].to_pylist()))
        try:
            self._folder.put(f"{name}.parquet", content)
            self._folder.put(f"{name}.ids", ids)
        except (ClusterError, OSError) as error:
            _log.warning("labels.cache: rows were not kept: %s", error)

    def refresh(self) -> None:
        """Take in what others have added since the first lookup."""
        with self._lock:
            self._loaded = False
            self._load()

    def _load(self) -> None:
        """Read the ids of files that are new."""
        if self._loaded:
            return
        self._loaded = True
        halves, places = [self._halves], [self._places]
        try:
            there = {item.name for item in self._folder.walk(self._below)}
            known = {f"{self._below}/{file}.ids" for file in self._files}
            fresh = sorted(name for name in there - known if name.endswith(".ids"))
            for name, content in self._folder.get_each(fresh):
                self._files.append(PurePosixPath(name).stem)
                if not content or len(content) % _ID_BYTES:  # or it is gone
                    _log.warning("%s: damaged; its rows are not used.", self._folder.path(name))
                    continue
                halves.append(_first_half(content))
                places.append(np.full(len(halves[-1]), len(self._files) - 1, dtype=np.uint32))
        except (ClusterError, OSError) as error:
            _log.warning("labels.cache: not all of it is used: %s", error)
        if len(halves) > 1:
            self._halves, self._places = np.concatenate(halves), np.concatenate(places)
            order = np.argsort(self._halves, kind="stable")
            self._halves, self._places = self._halves[order], self._places[order]

    def _candidates(self, ids: Sequence[str]) -> dict[int, set[str]]:
        """By file, the ids that it seems to hold; files with the most of them first."""
        left, right = self._range(_halves(ids))
        by_file: dict[int, set[str]] = defaultdict(set)
        for i in np.flatnonzero(left < right):
            for place in self._places[left[i] : right[i]].tolist():
                by_file[place].add(ids[i])
        return dict(sorted(by_file.items(), key=lambda item: -len(item[1])))

    def _range(self, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64[n] each: where rows with these halves begin and end."""
        return (
            np.searchsorted(self._halves, halves, side="left"),
            np.searchsorted(self._halves, halves, side="right"),
        )

    def _read(self, places: Sequence[int]) -> list[tuple[int, pa.Table]]:
        """Those of the data files that can be read."""
        absent = {self._data_name(p): p for p in places if p not in self._tables}
        try:
            for name, content in self._folder.get_each(absent, ahead=_TABLES):
                self._take_in(absent[name], name, content)
        except (ClusterError, OSError) as error:
            _log.warning("labels.cache: not all of it is used: %s", error)
        readable = [place for place in places if place in self._tables]
        for place in readable:
            self._tables.move_to_end(place)
        tables = [(place, self._tables[place]) for place in readable]
        while len(self._tables) > _TABLES:
            self._tables.popitem(last=False)
        return tables

    def _take_in(self, place: int, name: str, content: bytes | None) -> None:
        if content is not None and hashlib.sha256(content).hexdigest() == self._files[place]:
            table = parquet_table(content)
            if table.schema == self._schema:
                self._tables[place] = table
                return
        _log.warning("%s: damaged or gone; its rows are not used.", self._folder.path(name))
        whole = self._places != place  # the others' rows: those of this one may be added again
        self._halves, self._places = self._halves[whole], self._places[whole]

    def _data_name(self, place: int) -> str:
        return f"{self._below}/{self._files[place]}.parquet"


def _rows(table: pa.Table, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Records by id, of the ids that the table holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    at = pc.index_in(pa.array(ids, pa.string()), table["id"].combine_chunks()).drop_null()
    return {row["id"]: row for row in table.take(at).to_pylist()}


def _halves(ids: Sequence[str]) -> np.ndarray:
    """uint64[n] of ids of 32 hex digits."""
    return _first_half(bytes.fromhex("".join(ids)))


def _first_half(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, dtype=">u8").reshape(-1, 2)[:, 0].astype(np.uint64)
