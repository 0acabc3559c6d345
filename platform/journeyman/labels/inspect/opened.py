"""A label dataset to look at, finished or not, with the corpus that it labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from journeyman import corpus
from journeyman.errors import DataError, JourneymanError
from journeyman.folder import Folder
from journeyman.labels import dataset
from journeyman.labels.codec import Codec
from journeyman.labels.prior import corrected
from journeyman.labels.quality import class_logprobs
from journeyman.labels.schema import Commit
from journeyman.labels.store import LabelStore
from journeyman.recipe import Classes, Generate, Labels, Logits, Rationales

if TYPE_CHECKING:
    import pyarrow as pa

_LABELS: TypeAdapter[Labels] = TypeAdapter(Labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A dataset's manifest and commits.

    commits: of the finished shards, in corpus order; left_out: id, filter and value of the rows
    that the recipe's filters leave out; corpus_dir: the corpus it labels, where that is at hand;
    why_no_text: why it is not.
    """

    where: str
    store: LabelStore
    manifest: dict[str, Any]
    labels: Labels
    commits: list[Commit]
    left_out: pa.Table | None
    corpus_dir: str | Path | None
    why_no_text: str | None

    @property
    def complete(self) -> bool:
        return bool(self.manifest.get("complete"))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.labels.classes) if isinstance(self.labels, Classes | Rationales) else ()

    @property
    def codec(self) -> Codec | None:
        return dataset.codec_of(self.manifest)

    @property
    def log_prior(self) -> np.ndarray | None:
        """float64[c]; None where no prior is corrected for, or not yet."""
        prior = self.manifest.get("log_prior")
        return None if prior is None else np.asarray(prior, dtype=np.float64)

    @property
    def teacher(self) -> str:
        return str(self.manifest["identity"]["teacher"]["model"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be known of an unfinished dataset before its figures are read."""
        if self.complete:
            return ()
        n = len(self.commits)
        shards = "1 shard" if n == 1 else f"{n:,} shards"
        notes = [f"Not finished: this is of {shards}; journeyman label goes on."]
        if isinstance(self.labels, Classes) and self.labels.prior_correction == "batch":
            notes.append("Class probabilities are as the teacher gave them: the prior is fitted "
                         "when all shards are finished.")  # fmt: skip
        if isinstance(self.labels, Logits | Generate) and self.codec is None:
            notes.append("Token distributions can be read when all shards are finished.")
        return tuple(notes)

    def class_logprobs(self, table: pa.Table) -> np.ndarray:
        """float64[n, c], prior corrected and normalised: what readers of the dataset get."""
        return corrected(class_logprobs(table, len(self.classes)), self.log_prior)

    def shards(self) -> Iterator[tuple[Commit, pa.Table]]:
        """Every finished shard with its rows, those that filters leave out aside."""
        for commit in self.commits:
            yield commit, self.kept(self.store.read_shard(commit))

    def kept(self, table: pa.Table) -> pa.Table:
        import pyarrow.compute as pc

        if self.left_out is None or not len(self.left_out):
            return table
        return table.filter(pc.invert(pc.is_in(table["id"], self.left_out["id"])))

    def corpus_rows(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """Rows of the shard that was labeled, by id; none where the corpus is not at hand."""
        if self.corpus_dir is None or not Folder(self.corpus_dir).has(commit.shard):
            return {}
        table = corpus.read_shard(self.corpus_dir, commit.shard)
        return {row["id"]: row for row in table.to_pylist()}


def open_dataset(
    where: str | Path, corpus_dir: str | Path | None = None, run_corpus: str | Path | None = None
) -> Opened:
    """Open a dataset's folder or URL; raises DataError where there is none.

    corpus_dir: the corpus it labels, for texts; DataError if it is not. run_corpus: where to look
    for it otherwise; default the folder ``corpus`` beside the dataset, as in a run.
    """
    store = LabelStore(where)
    manifest = store.manifest()
    found = store.commits()
    # A finished dataset names its shards in corpus order; their names sort in that order anyway.
    names = manifest.get("shards") or sorted(found)
    digest = manifest["identity"]["corpus"]
    if corpus_dir is not None and corpus.read_manifest(corpus_dir)["digest"] != digest:
        raise DataError(f"{corpus_dir} holds another corpus than the one that {where} labels.")
    corpus_dir, why_no_text = (
        (corpus_dir, None) if corpus_dir else _corpus(where, run_corpus, digest)
    )
    filtered = manifest.get("filtered") or {}
    return Opened(
        where=str(where),
        store=store,
        manifest=manifest,
        labels=_labels(where, manifest),
        commits=[found[name] for name in names if name in found],
        left_out=store.read_table(filtered["file"]) if filtered.get("file") else None,
        corpus_dir=corpus_dir,
        why_no_text=why_no_text,
    )


def _labels(where: str | Path, manifest: dict[str, Any]) -> Labels:
    try:
        return _LABELS.validate_python(manifest["identity"]["labels"])
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{where}: its labels have a setting that this version does not know "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}); read it with the version that "
            "wrote it."
        ) from error


def _corpus(
    where: str | Path, run_corpus: str | Path | None, digest: str
) -> tuple[str | Path | None, str | None]:
    """The corpus of this digest, or why it is not at hand."""
    folder = run_corpus or f"{str(where).rstrip('/').rpartition('/')[0] or '.'}/corpus"
    try:
        there = corpus.read_manifest(folder)["digest"]
    except JourneymanError:
        return None, f"no corpus in {folder}; name it with --corpus to see texts"
    if there == digest:
        return folder, None
    return None, f"{folder} holds another corpus now; name the right one with --corpus"
