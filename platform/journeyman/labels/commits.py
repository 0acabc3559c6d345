"""The commits of a label dataset: one small file for each shard that is done.

They are created only if absent and never changed. A compacted file, which repeats many of them,
spares reading each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.labels.parquet import parquet_bytes, parquet_table
from journeyman.labels.schema import Commit

_COMMIT = re.compile(r"commits/(?P<stem>.+?)(?:\.g(?P<generation>\d+))?\.json")
_NAMED = ("data", "quarantine", "filtered_file")  # files, by a commit
_log = logging.getLogger(__name__)


class _CommitFile(NamedTuple):
    """A file under commits/, of which only the name has been read."""

    name: str
    tag: str
    shard: str
    generation: int


class CommitFiles:
    """Those in one folder. May be pickled."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def done(self, generation: int = 0) -> set[str]:
        """Shards with a commit of at least this generation. Names are listed, no file is read."""
        return {file.shard for file in self._files() if file.generation >= generation}

    def newest(self) -> dict[str, Commit]:
        """The commit of each shard's highest generation, by the shard's name, sorted."""
        files = _highest(self._files())
        return {commit.shard: commit for commit in self._read(files, self._compacted())}

    def compact(self) -> dict[str, Commit]:
        """Repeat all commits in one file, for ``newest`` to read; returns what that gives.

        The loose files stay: to be created only if absent is what they are for.
        """
        files = list(self._files())
        held = self._compacted()
        commits = self._read(files, held)
        if not all(file.name in held and held[file.name][0] == file.tag for file in files):
            outdated = [listed.name for listed in self._folder.walk("compacted")]
            content = _compacted_bytes(files, commits)
            name = f"compacted/{hashlib.sha256(content).hexdigest()}.parquet"
            self._folder.put(name, content)
            for old in outdated:
                if old != name:
                    self._folder.delete(old)
        read = {file.name: commit for file, commit in zip(files, commits, strict=True)}
        return {file.shard: read[file.name] for file in _highest(files)}

    def _files(self) -> Iterator[_CommitFile]:
        for listed in self._folder.walk("commits"):
            if match := _COMMIT.fullmatch(listed.name):
                yield _CommitFile(
                    name=listed.name,
                    tag=listed.tag,
                    shard=f"{match['stem']}.parquet",
                    generation=int(match["generation"] or 0),
                )

    def _read(
        self, files: Sequence[_CommitFile], held: dict[str, tuple[str, Commit]]
    ) -> list[Commit]:
        """Commits of files, in this order; only those are read that ``held`` has not as it is."""
        known = {
            file.name: held[file.name][1]
            for file in files
            if file.name in held and held[file.name][0] == file.tag
        }
        loose = [file.name for file in files if file.name not in known]
        for name, content in self._folder.get_each(loose):
            if content is None:
                path = self._folder.path(name)
                raise DataError(f"{path}: removed while it was being read; run again.")
            known[name] = self._commit(name, content)
        return [known[file.name] for file in files]

    def _commit(self, name: str, content: bytes) -> Commit:
        path = self._folder.path(name)
        try:
            return Commit(**from_json(path, content))
        except TypeError as error:
            raise DataError(
                f"{path}: not a commit of this version; remove it and label again."
            ) from error

    def _compacted(self) -> dict[str, tuple[str, Commit]]:
        """The newest compacted file: tag and commit by commit file name.

        A commit that has been removed, or made anew, since is not listed under the same tag.
        """
        columns = self._compacted_columns()
        names, tags = columns.pop("_name", []), columns.pop("_tag", [])
        rows = zip(*columns.values(), strict=True)
        commits = (Commit(**dict(zip(columns, row, strict=True))) for row in rows)
        return dict(zip(names, zip(tags, commits, strict=True), strict=True))

    def _compacted_columns(self, names: Sequence[str] | None = None) -> dict[str, list[Any]]:
        """Of the newest compacted file, by name; none where there is no such file."""
        listed = sorted(self._folder.walk("compacted"), key=lambda item: item.modified)
        if not listed:
            return {}
        name = listed[-1].name
        try:
            content = self._folder.get(name)
        except FileNotFoundError:  # one that is newer has just taken its place
            return {}
        if hashlib.sha256(content).hexdigest() != PurePosixPath(name).stem:
            _log.warning("%s: damaged; reading each commit instead.", self._folder.path(name))
            return {}
        return parquet_table(content, names).to_pydict()

    def standing(self, shard: str, generation: int) -> Commit | None:
        """The commit of a shard, of just this generation, if it is there."""
        name = commit_name(shard, generation)
        try:
            return self._commit(name, self._folder.get(name))
        except FileNotFoundError:
            return None

    def create(self, commit: Commit) -> Commit:
        """Commit a shard; returns the commit that stands.

        Whose that is, is told by the data file's name: an object store's client that got no answer
        asks again, and is then told that its own commit exists already.
        """
        name = commit_name(commit.shard, commit.generation)
        if self._folder.create(name, as_json(dataclasses.asdict(commit))):
            return commit
        return self._commit(name, self._folder.get(name))

    def named_files(self) -> set[str | None]:
        """The files that commits name. Of a million commits' other columns nothing is made."""
        wanted = ("_name", "_tag", *_NAMED)
        columns = self._compacted_columns(wanted)
        files = list(self._files())
        tags = {file.name: file.tag for file in files}
        named: set[str | None] = set()
        held = set()
        for name, tag, *there in zip(*(columns.get(c, []) for c in wanted), strict=True):
            if tags.get(name) == tag:
                held.add(name)
                named.update(there)
        for commit in self._read([file for file in files if file.name not in held], {}):
            named.update(getattr(commit, field) for field in _NAMED)
        return named


def _highest(files: Iterable[_CommitFile]) -> list[_CommitFile]:
    """Of each shard the file of its highest generation, in the order of the shards' names."""
    highest: dict[str, _CommitFile] = {}
    for file in files:
        there = highest.get(file.shard)
        if there is None or file.generation > there.generation:
            highest[file.shard] = file
    return [highest[shard] for shard in sorted(highest)]


def _compacted_bytes(files: Sequence[_CommitFile], commits: Sequence[Commit]) -> bytes:
    import pyarrow as pa

    fields = [field.name for field in dataclasses.fields(Commit)]
    columns = {name: [getattr(commit, name) for commit in commits] for name in fields}
    columns["_name"] = [file.name for file in files]
    columns["_tag"] = [file.tag for file in files]
    return parquet_bytes(pa.table(columns))


def commit_name(shard: str, generation: int) -> str:
    suffix = f".g{generation}" if generation else ""
    return f"commits/{stem(shard)}{suffix}.json"


def stem(shard: str) -> str:
    return PurePosixPath(shard).stem


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def from_json(path: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: damaged, not JSON ({error}); remove it and run again.") from error
