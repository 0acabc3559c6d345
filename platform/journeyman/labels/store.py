"""The files of a label dataset: shards, commits, quarantine and the manifest.

A shard is done when its commit exists. The commit is created last and only if absent, so that of
two replicas that finish the same shard one wins, and the loser removes its own file.
"""

from __future__ import annotations

import dataclasses
import io
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import files
from journeyman.errors import ClusterError, DataError
from journeyman.labels import schema
from journeyman.labels.schema import SCHEMA_VERSION, Commit, Quarantined

if TYPE_CHECKING:
    import pyarrow as pa


class LabelStore:
    """A label dataset in a folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self, identity: dict[str, Any]) -> None:
        """Begin the dataset, or go on with one of the same identity; raises DataError."""
        path = self.directory / "manifest.json"
        if not path.exists():
            files.write_json(path, {"schema": SCHEMA_VERSION, "identity": identity})
            return
        there = self.manifest()["identity"]
        changed = {k for k in there.keys() | identity.keys() if there.get(k) != identity.get(k)}
        if changed:
            differences = "\n".join(
                f"  {k}: there {_short(there.get(k))}, asked {_short(identity.get(k))}"
                for k in sorted(changed)
            )
            raise DataError(
                f"{self.directory} holds labels made otherwise:\n{differences}\n"
                "Nothing was changed. Start a new dataset with --new (the old one is kept as "
                f"{self.directory.name}.old), or give the run another name."
            )

    def manifest(self) -> dict[str, Any]:
        manifest = files.read_json(self.directory / "manifest.json")
        if manifest.get("schema") != SCHEMA_VERSION:
            raise DataError(
                f"{self.directory}: a label dataset of schema {manifest.get('schema')}, this "
                f"version reads {SCHEMA_VERSION}."
            )
        return manifest

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the totals into the manifest: the dataset is whole."""
        manifest = self.manifest() | facts
        files.write_json(self.directory / "manifest.json", manifest)
        return manifest

    def commits(self) -> dict[str, Commit]:
        """Commits by shard name."""
        found = {}
        for path in sorted((self.directory / "commits").glob("*.json")):
            commit = Commit(**files.read_json(path))
            found[commit.shard] = commit
        return found

    def write(self, commit: Commit, labels: pa.Table, quarantined: list[Quarantined]) -> Commit:
        """Write one shard's files, then its commit; returns the commit that stands.

        ``commit`` has all but the files' names, bytes and digest.
        """
        stem = Path(commit.shard).stem
        attempt = uuid.uuid4().hex[:12]
        data = self.directory / "shards" / f"{stem}.{attempt}.parquet"
        content = _parquet(labels)
        files.write_bytes(data, content)
        quarantine = self.directory / "quarantine" / data.name if quarantined else None
        if quarantine:
            files.write_bytes(quarantine, _parquet(_quarantine_table(quarantined)))
        complete = dataclasses.replace(
            commit,
            data=str(data.relative_to(self.directory)),
            quarantine=str(quarantine.relative_to(self.directory)) if quarantine else None,
            sha256=files.file_digest(data),
            bytes=len(content),
        )
        standing = self._create(f"commits/{stem}.json", complete)
        if standing is not complete:
            for path in (data, quarantine):
                if path:
                    path.unlink(missing_ok=True)
        return standing

    def _create(self, name: str, commit: Commit) -> Commit:
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError
        from obstore.store import LocalStore

        content = json.dumps(dataclasses.asdict(commit), indent=2).encode()
        with files.disk_errors(self.directory):
            (self.directory / "commits").mkdir(parents=True, exist_ok=True)
            try:
                obstore.put(LocalStore(self.directory), name, content, mode="create")
            except AlreadyExistsError:
                return Commit(**files.read_json(self.directory / name))
            except BaseError as error:  # obstore's own, for a full disk as for a lost store
                raise ClusterError(
                    f"{self.directory / name}: the commit cannot be written, as on a full disk "
                    f"({str(error).splitlines()[0]}); mend that and run the same command again: "
                    "it goes on where it stopped."
                ) from error
        return commit

    def read_shard(self, commit: Commit) -> pa.Table:
        """Labels of a committed shard; raises DataError if the file is gone or was changed."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.directory / commit.data
        mend = f"remove {self.directory / 'commits' / Path(commit.shard).stem}.json and label again"
        try:
            if path.stat().st_size != commit.bytes:
                raise DataError(f"{path}: {path.stat().st_size} bytes where the commit says "
                                f"{commit.bytes}; {mend}.")  # fmt: skip
            return pq.read_table(path, schema=schema.classes_schema())
        except FileNotFoundError as error:
            raise DataError(f"{path}: committed, but gone; {mend}.") from error
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: not a readable label shard ({reason}); {mend}.") from error


def _parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _quarantine_table(quarantined: list[Quarantined]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(
        [dataclasses.asdict(row) for row in quarantined], schema=schema.quarantine_schema()
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
