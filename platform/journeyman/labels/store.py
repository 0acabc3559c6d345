"""The files of a label dataset: shards, commits, quarantine, attempts and the manifest.

A shard is done when its commit exists. The commit is created last and only if absent, so that of
two replicas that finish the same shard one wins, and the loser removes its own files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.errors import DataError, JourneymanError
from journeyman.folder import Folder
from journeyman.labels import schema
from journeyman.labels.commits import CommitFiles, as_json, commit_name, from_json, stem
from journeyman.labels.parquet import parquet_bytes, parquet_table
from journeyman.labels.schema import SCHEMA_VERSION, Commit, Filtered, Quarantined

if TYPE_CHECKING:
    import pyarrow as pa

_MANIFEST = "manifest.json"
_ATTEMPT = re.compile(r"(?:shards|quarantine|filtered)/.+\.[0-9a-f]{12}\.parquet")
_DIFFERENCES = 10  # that a refusal names
_ORPHANED_AFTER_S = 3600.0


class LabelStore:
    """A label dataset in a folder or behind an object store's URL. May be pickled."""

    def __init__(self, where: str | Path) -> None:
        self.folder = Folder(where)
        self._commits = CommitFiles(self.folder)

    @property
    def where(self) -> str:
        return self.folder.where

    @property
    def everywhere(self) -> str:
        """The same for processes with another working directory."""
        return self.folder.everywhere

    @property
    def directory(self) -> Path | None:
        """The local folder; None behind a URL."""
        return self.folder.directory

    # --- the manifest ---

    def open(self, identity: dict[str, Any]) -> None:
        """Begin the dataset, or go on with one of the same identity; raises DataError."""
        begun = {"schema": SCHEMA_VERSION, "identity": identity}
        if self._json(_MANIFEST) is None and self.folder.create(_MANIFEST, as_json(begun)):
            return
        changed = list(differences(in_order(self.manifest()["identity"]), in_order(identity)))
        if changed:
            more = len(changed) - _DIFFERENCES
            lines = [*changed[:_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
            raise DataError(
                "\n  ".join([f"{self.where} holds labels made otherwise:", *lines])
                + f"\nNothing was changed. {self._begin_another()}"
            )

    def manifest(self) -> dict[str, Any]:
        manifest = self._json(_MANIFEST)
        if manifest is None:
            path = self.folder.path(_MANIFEST)
            raise DataError(f"{path}: not found; run the step that writes it first.")
        written = manifest.get("schema")
        if written != SCHEMA_VERSION:
            mend = self._begin_another()
            if isinstance(written, int) and written > SCHEMA_VERSION:
                mend = "Install the version of Journeyman that wrote it."
            raise DataError(
                f"{self.where}: a label dataset of schema {written}, this version reads "
                f"{SCHEMA_VERSION}. {mend}"
            )
        return manifest

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write facts into the manifest, in place of those of the same names."""
        manifest = self.manifest() | facts
        self.folder.put(_MANIFEST, as_json(manifest))
        return manifest

    def _begin_another(self) -> str:
        if self.directory is None:
            return "Start a new dataset: give labels.destination another URL."
        return (
            "Start a new dataset with --new (the old one is kept as "
            f"{self.directory.name}.old), or give the run another name."
        )

    @functools.cached_property
    def _label_schema(self) -> pa.Schema:
        return schema.label_schema(self.manifest()["identity"]["kind"])

    def know_kind(self) -> None:
        """Read what shards are checked against, for processes that this is pickled to: each would
        read the whole manifest for it."""
        _ = self._label_schema

    # --- commits ---

    def done(self, generation: int = 0) -> set[str]:
        """Shards with a commit of at least this generation. Names are listed, no file is read."""
        return self._commits.done(generation)

    def commits(self) -> dict[str, Commit]:
        """The commit of each shard's highest generation, by the shard's name, sorted."""
        return self._commits.newest()

    def compact(self) -> dict[str, Commit]:
        """Repeat all commits in one file, for ``commits`` to read; returns what that gives."""
        return self._commits.compact()

    def standing(self, shard: str, generation: int) -> Commit | None:
        """The commit of a shard, of just this generation, if it is there."""
        return self._commits.standing(shard, generation)

    # --- shards ---

    def write(
        self,
        commit: Commit,
        labels: pa.Table,
        quarantined: Sequence[Quarantined],
        filtered: Sequence[Filtered],
    ) -> Commit:
        """Write one shard's files, then its commit; returns the commit that stands.

        ``commit`` has all but the files' names, bytes and digest.
        """
        attempt = f"{stem(commit.shard)}.{uuid.uuid4().hex[:12]}.parquet"
        data = f"shards/{attempt}"
        contents = {data: parquet_bytes(labels)}
        if quarantined:
            table = _records_table(quarantined, schema.quarantine_schema())
            contents[f"quarantine/{attempt}"] = parquet_bytes(table)
        if filtered:
            table = _records_table(filtered, schema.filtered_schema())
            contents[f"filtered/{attempt}"] = parquet_bytes(table)
        complete = dataclasses.replace(
            commit,
            data=data,
            quarantine=f"quarantine/{attempt}" if quarantined else None,
            filtered_file=f"filtered/{attempt}" if filtered else None,
            sha256=hashlib.sha256(contents[data]).hexdigest(),
            bytes=len(contents[data]),
        )
        self._put_all(contents)
        # What fails from here on may have been committed all the same: the files stay.
        standing = self._commits.create(complete)
        if standing.data != data:
            self._delete_all(contents)
        return standing

    def _put_all(self, contents: dict[str, bytes]) -> None:
        try:
            for name, content in contents.items():
                self.folder.put(name, content)
        except BaseException:
            self._delete_all(contents)
            raise

    def _delete_all(self, names: Collection[str]) -> None:
        with contextlib.suppress(JourneymanError):  # remove_orphans comes by again
            for name in names:
                self.folder.delete(name)

    def read_shard(self, commit: Commit) -> pa.Table:
        """Labels of a committed shard; raises DataError if the file is gone or was changed."""
        content = self._committed(commit, commit.data)
        path, mend = self.folder.path(commit.data), self._mend(commit)
        if len(content) != commit.bytes:
            raise DataError(
                f"{path}: {len(content)} bytes where the commit says {commit.bytes}; {mend}."
            )
        if hashlib.sha256(content).hexdigest() != commit.sha256:
            raise DataError(f"{path}: its bytes are not those that were committed; {mend}.")
        table = self._table(commit.data, content, mend)
        if table.schema != self._label_schema:
            raise DataError(f"{path}: not of the kind that the manifest names; {mend}.")
        if len(table) != commit.ok:
            raise DataError(f"{path}: {len(table)} rows where the commit says {commit.ok}; {mend}.")
        return table

    def read_quarantine(self, commit: Commit) -> list[Quarantined]:
        return [Quarantined(**row) for row in self._records(commit, commit.quarantine)]

    def read_filtered(self, commit: Commit) -> list[Filtered]:
        return [Filtered(**row) for row in self._records(commit, commit.filtered_file)]

    def _records(self, commit: Commit, name: str | None) -> list[dict[str, Any]]:
        if name is None:
            return []
        return self._table(name, self._committed(commit, name), self._mend(commit)).to_pylist()

    def _committed(self, commit: Commit, name: str) -> bytes:
        try:
            return self.folder.get(name)
        except FileNotFoundError as error:
            raise DataError(
                f"{self.folder.path(name)}: committed, but gone; {self._mend(commit)}."
            ) from error

    def _mend(self, commit: Commit) -> str:
        name = commit_name(commit.shard, commit.generation)
        return f"remove {self.folder.path(name)} and label again"

    # --- files beside the shards ---

    def write_text(self, name: str, text: str) -> None:
        self.folder.put(name, text.encode())

    def write_table(self, name: str, table: pa.Table) -> None:
        self.folder.put(name, parquet_bytes(table))

    def read_table(self, name: str) -> pa.Table:
        """Raises DataError if it is gone or damaged."""
        mend = "run journeyman label again"
        try:
            return self._table(name, self.folder.get(name), mend)
        except FileNotFoundError as error:
            raise DataError(f"{self.folder.path(name)}: not found; {mend}.") from error

    def _table(self, name: str, content: bytes, mend: str) -> pa.Table:
        import pyarrow as pa

        try:
            return parquet_table(content)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.folder.path(name)}: not a readable Parquet file "
                f"({str(error).splitlines()[0]}); {mend}."
            ) from error

    # --- what a shard's rows did to their replicas ---

    def read_attempts(self, shard: str) -> dict[str, Any] | None:
        return self._json(_attempts_name(shard))

    def write_attempts(self, shard: str, value: dict[str, Any]) -> None:
        self.folder.put(_attempts_name(shard), as_json(value))

    def clear_attempts(self, shard: str) -> None:
        self.folder.delete(_attempts_name(shard))

    # --- the end of a run ---

    def remove_orphans(self, older_than_s: float = _ORPHANED_AFTER_S) -> int:
        """Delete files of shards that no commit names; returns how many.

        Young ones stay: the replica that wrote them may be about to commit them.
        """
        limit = datetime.now(UTC) - timedelta(seconds=older_than_s)
        folders = ("shards", "quarantine", "filtered")
        written = [
            listed.name
            for listed in itertools.chain.from_iterable(map(self.folder.walk, folders))
            if listed.modified <= limit and _ATTEMPT.fullmatch(listed.name)
        ]
        # Read after the files were listed, and so not missing any.
        named = self._commits.named_files()
        orphans = [name for name in written if name not in named]
        for name in orphans:
            self.folder.delete(name)
        self.folder.delete_unfinished(older_than_s)
        return len(orphans)

    def _json(self, name: str) -> Any:
        """None if there is no such file."""
        try:
            return from_json(self.folder.path(name), self.folder.get(name))
        except FileNotFoundError:
            return None


def in_order(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity whose classes are a list, and whose JSON Schema is text: class_logprobs stand in
    the order of the classes and an answer has its properties in that of the schema, and neither
    comparing objects nor digests of canonical JSON would see it change."""
    plain = json.loads(json.dumps(identity))
    labels = plain.get("labels")
    if isinstance(labels, dict) and isinstance(labels.get("classes"), dict):
        labels["classes"] = [list(pair) for pair in labels["classes"].items()]
    structured = labels.get("structured") if isinstance(labels, dict) else None
    if isinstance(structured, dict) and isinstance(structured.get("json_schema"), dict):
        structured["json_schema"] = json.dumps(structured["json_schema"])
    return plain


def _records_table(records: Sequence[Quarantined] | Sequence[Filtered], of: pa.Schema) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist([dataclasses.asdict(record) for record in records], schema=of)


def _attempts_name(shard: str) -> str:
    return f"attempts/{stem(shard)}.json"


def differences(there: object, asked: object, path: str = "") -> Iterator[str]:
    """A line for each value that two identities, or parts of them, do not have alike."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in sorted(there.keys() | asked.keys()):
            below = f"{path}.{key}" if path else key
            yield from differences(there.get(key), asked.get(key), below)
    elif isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        for i, (old, new) in enumerate(zip(there, asked, strict=True)):
            yield from differences(old, new, f"{path}[{i}]")
    elif there != asked:
        yield f"{path}: there {_short(there)}, asked {_short(asked)}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
