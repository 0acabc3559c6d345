"""Reading a finished label dataset: corpus rows joined with what the teacher said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import corpus
from journeyman.errors import DataError
from journeyman.labels.prior import corrected
from journeyman.labels.store import LabelStore

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRows:
    """Rows of a classes dataset, in corpus order.

    ids, texts: n strings; splits: n strings; gold: int64[n], index into labels, -1 without gold;
    logprobs: float64[n, c], the teacher's class log-probabilities, prior corrected, normalised.
    """

    labels: tuple[str, ...]
    ids: list[str]
    texts: list[str]
    splits: np.ndarray
    gold: np.ndarray
    logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, name: str) -> ClassRows:
        return self.take(np.flatnonzero(self.splits == name))

    def take(self, index: np.ndarray) -> ClassRows:
        return ClassRows(
            labels=self.labels,
            ids=[self.ids[i] for i in index],
            texts=[self.texts[i] for i in index],
            splits=self.splits[index],
            gold=self.gold[index],
            logprobs=self.logprobs[index],
        )


def read(labels_dir: Path) -> pa.Table:
    """A finished dataset as one Arrow table, shards in corpus order, log-probabilities as
    captured (before prior correction); raises DataError if it is not finished or damaged."""
    import pyarrow as pa

    store = LabelStore(labels_dir)
    manifest = finished_manifest(store)
    commits = store.commits()
    missing = [s for s in manifest["shards"] if s not in commits]
    if missing:
        raise DataError(f"{labels_dir}: shard {missing[0]} has no commit; run journeyman label.")
    return pa.concat_tables([store.read_shard(commits[s]) for s in manifest["shards"]])


def finished_manifest(store: LabelStore) -> dict[str, Any]:
    manifest = store.manifest()
    if not manifest.get("complete"):
        raise DataError(f"{store.directory}: not finished; run journeyman label again.")
    return manifest


def read_classes(
    labels_dir: Path, corpus_dir: Path, splits: Sequence[str] | None = None
) -> ClassRows:
    """Labeled rows of the wanted splits (all by default), with their texts.

    Raises DataError: dataset not finished, damaged, or made of another corpus.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    manifest = finished_manifest(LabelStore(labels_dir))
    if corpus.read_manifest(corpus_dir)["digest"] != manifest["identity"]["corpus"]:
        raise DataError(f"{labels_dir} labels another corpus than {corpus_dir} holds now; "
                        "run journeyman label --new.")  # fmt: skip
    labels = tuple(manifest["identity"]["classes"])
    table = read(labels_dir)
    if splits is not None:
        table = table.filter(pc.is_in(table["split"], pa.array(list(splits))))
    texts = _texts(corpus_dir)
    ids = table["id"].to_pylist()
    flat = table["class_logprobs"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    index = {label: i for i, label in enumerate(labels)}
    prior = manifest["log_prior"]
    return ClassRows(
        labels=labels,
        ids=ids,
        texts=[texts[row_id] for row_id in ids],
        splits=np.array(table["split"].to_pylist(), dtype=object),
        gold=np.array([index.get(g, -1) for g in table["gold"].to_pylist()], dtype=np.int64),
        logprobs=corrected(
            flat.reshape(len(ids), len(labels)), None if prior is None else np.asarray(prior)
        ),
    )


def _texts(corpus_dir: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for shard in corpus.read_manifest(corpus_dir)["shards"]:
        table = corpus.read_shard(corpus_dir / shard["name"])
        texts.update(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    return texts
