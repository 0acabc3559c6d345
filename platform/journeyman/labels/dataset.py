"""Reading a finished label dataset: as Arrow tables, a Ray or a Hugging Face dataset, or joined
with its corpus. Rows that the recipe's filters leave out are left out by every reader."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import corpus, files
from journeyman.cluster import InTask, quiet_ray_data, reason_of
from journeyman.errors import ClusterError, DataError, JourneymanError
from journeyman.folder import Folder
from journeyman.labels.codec import Codec, Distributions
from journeyman.labels.prior import corrected
from journeyman.labels.schema import Commit, label_schema
from journeyman.labels.store import LabelStore, differences, in_order
from journeyman.recipe import Labels, digest
from journeyman.teacher.tasks import row_values

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import ray.data

# Of a shard's name and its labeled rows, whatever is to become of them.
Make = Callable[[str, "pa.Table"], Iterable["pa.Table"]]
Over = Callable[[str | Path, Make], Iterator["pa.Table"]]  # ``made`` or ``streamed``
_BLOCKS = 10_000  # tasks that shards are read by, at most
_STUCK_S = 2 * 3600.0  # without a row: longer than nodes take to come


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRows:
    """Rows of a classes dataset, in corpus order.

    ids, texts: n strings; splits: n strings; gold: int64[n], index into labels, -1 without gold;
    logprobs: float64[n, c], the teacher's class log-probabilities, prior corrected, normalised;
    metas: the further columns of each row, n of them or none at all.
    """

    labels: tuple[str, ...]
    ids: list[str]
    texts: list[str]
    splits: np.ndarray
    gold: np.ndarray
    logprobs: np.ndarray
    metas: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def columns(self) -> list[dict[str, Any]]:
        """Each row as templates see it."""
        metas = self.metas or [{}] * len(self)
        return [row_values(text, meta) for text, meta in zip(self.texts, metas, strict=True)]

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
            metas=[self.metas[i] for i in index] if self.metas else [],
        )


def finished_manifest(store: LabelStore) -> dict[str, Any]:
    """Raises DataError where rows are left to label, or the prior and the filters, which come
    last, are not there."""
    manifest = labeled_manifest(store)
    if manifest.get("filtered", {}) is None:
        raise DataError(f"{store.where}: not finished; run journeyman label again.")
    return manifest


def is_finished(where: str | Path) -> bool:
    """Whether ``finished_manifest`` has one: a run may have been killed behind its last row."""
    try:
        return bool(finished_manifest(LabelStore(where)))
    except DataError:
        return False


def totals(where: str | Path) -> dict[str, Any]:
    """Counts and seconds over a finished dataset; empty where there is none."""
    return dict(LabelStore(where).manifest()["totals"]) if is_finished(where) else {}


def labeled_manifest(store: LabelStore) -> dict[str, Any]:
    """Of a dataset whose rows are all labeled."""
    manifest = store.manifest()
    if not manifest.get("complete"):
        raise DataError(f"{store.where}: not finished; run journeyman label again.")
    return manifest


def check_asked(labels_dir: str | Path, identity: dict[str, Any], labels: Labels) -> None:
    """Raises DataError where labels of this kind were asked for in another way."""
    if identity["kind"] != labels.kind or "labels" not in identity:
        return
    there, asked = ({"labels": facts} for facts in (identity["labels"], labels.asked()))
    for change in differences(in_order(there), in_order(asked)):
        raise DataError(
            f"{labels_dir} holds labels made otherwise than the recipe asks now ({change}): run "
            "journeyman label --new, or take the change back."
        )


def check_corpus(labels_dir: str | Path, identity: dict[str, Any], corpus_dir: str | Path) -> None:
    """Raises DataError if the labels were made of another corpus than the folder holds."""
    if corpus.read_manifest(corpus_dir)["digest"] != identity["corpus"]:
        raise DataError(f"{labels_dir} labels another corpus than {corpus_dir} holds now; "
                        "run journeyman label --new.")  # fmt: skip


def codec_of(manifest: dict[str, Any]) -> Codec | None:
    """What the dataset's distributions are written in; None where it has none.

    Raises DataError for a codec of a newer version.
    """
    codec = manifest.get("codec")
    return codec and Codec.described(codec)


def read(where: str | Path, *, filtered: bool = False) -> pa.Table:
    """A finished dataset as one Arrow table, shards in corpus order, log-probabilities as
    captured (before prior correction). filtered: with the rows that filters leave out.

    Raises DataError if it is not finished or damaged. ``tables`` takes one shard's memory.
    """
    import pyarrow as pa

    kind = labeled_manifest(LabelStore(where))["identity"]["kind"]
    return pa.concat_tables([label_schema(kind).empty_table(), *tables(where, filtered=filtered)])


def tables(where: str | Path, *, filtered: bool = False) -> Iterator[pa.Table]:
    """The same, shard by shard."""
    return (table for _, table in shards(where, filtered=filtered))


def shards(where: str | Path, *, filtered: bool = False) -> Iterator[tuple[str, pa.Table]]:
    """The same, each with the name of its corpus shard."""
    store = LabelStore(where)
    manifest = labeled_manifest(store) if filtered else finished_manifest(store)
    left_out = None if filtered else _left_out(store, manifest)
    for commit in _finished_commits(store, manifest):
        yield commit.shard, _kept(store.read_shard(commit), left_out)


def distributions(table: pa.Table, codec: Codec) -> Iterator[Distributions | None]:
    """Decoded rows of a dataset of token labels; None where the teacher gave no distributions."""
    for column in table.select(["logprobs", "n_positions"]).to_batches():
        for data, n_positions in zip(column[0], column[1].to_pylist(), strict=True):
            yield codec.decode(data.as_py(), n_positions) if data.is_valid else None


def made(where: str | Path, make: Make) -> Iterator[pa.Table]:
    """What ``make`` gives for each shard of a finished dataset, here, one after the other."""
    for shard, table in shards(where):
        yield from make(shard, table)


def streamed(where: str | Path, make: Make) -> Iterator[pa.Table]:
    """The same tables, made by Ray Data: several shards at a time, on all nodes, some ahead.

    Ray must be initialised, and ``where`` be readable on all nodes. Raises what ``make`` does, of
    ours; ClusterError for anything else, and where nothing comes for hours.
    """
    import ray
    from ray.data.exceptions import ExecutionTimeoutError

    rows = _mapped(where, make, filtered=False)
    rows.context.enable_progress_bars = False
    rows.context.execution_no_progress_timeout_s = _STUCK_S
    quiet_ray_data()
    try:
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise reason_of(error, "reading the labels") from error
    except ExecutionTimeoutError as error:
        raise ClusterError(
            f"reading the labels stopped: nothing came for {_STUCK_S / 3600:g} hours; either no "
            "node has a free CPU (`ray status`), or the tasks die one after the other (out of "
            "memory, say: Ray's log files name it). The same command begins again."
        ) from error


def read_ray(where: str | Path, *, filtered: bool = False) -> ray.data.Dataset:
    """A Ray dataset that streams a finished one, in corpus order; a block for each shard, or, of
    more than ten thousand, for some of them.

    Ray must be initialised, and ``where`` be readable on all nodes.
    """
    return _mapped(where, _as_it_is, filtered=filtered)


def _as_it_is(shard: str, table: pa.Table) -> list[pa.Table]:
    return [table]


def _mapped(where: str | Path, make: Make, *, filtered: bool) -> ray.data.Dataset:
    import ray.data

    store = LabelStore(where)
    manifest = labeled_manifest(store) if filtered else finished_manifest(store)
    if store.directory is not None:  # workers have working directories of their own
        store = LabelStore(store.directory.resolve())
    commits = _finished_commits(store, manifest)
    left_out = None if filtered else _left_out(store, manifest)
    store.know_kind()
    packed = -(-len(commits) // _BLOCKS)
    read = ray.data.from_items(
        [{"commit": json.dumps(dataclasses.asdict(commit))} for commit in commits],
        override_num_blocks=-(-len(commits) // packed),
    ).map_batches(
        _make,
        batch_size=packed,
        batch_format="pyarrow",
        fn_args=(store, left_out, make),  # Ray Data puts a function with its arguments away once
    )
    read.context.execution_options.preserve_order = True  # of this dataset alone
    return read


def _make(
    batch: pa.Table, store: LabelStore, left_out: pa.Array | None, make: Make
) -> Iterator[pa.Table]:
    for commit in batch["commit"].to_pylist():
        found = Commit(**json.loads(commit))
        try:
            yield from make(found.shard, _kept(store.read_shard(found), left_out))
        except JourneymanError as error:
            raise InTask(error) from error
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            told = f"{store.folder.path(found.data)}: {type(error).__name__}: {first}"
            raise InTask(ClusterError(told)) from error


def to_hf(where: str | Path, *, filtered: bool = False) -> datasets.Dataset:
    """A Hugging Face dataset: a memory-mapped copy in the cache folder of ``datasets``.

    Written shard by shard, once for each state of the dataset.
    """
    import datasets
    import pyarrow as pa

    manifest = finished_manifest(LabelStore(where))
    state = digest([manifest["digest"], manifest.get("filtered"), filtered])
    path = Path(datasets.config.HF_DATASETS_CACHE) / "journeyman" / f"{state}.arrow"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with files.disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                columns = label_schema(manifest["identity"]["kind"])
                with pa.ipc.new_stream(temporary, columns) as stream:
                    for table in tables(where, filtered=filtered):
                        stream.write_table(table)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


def read_classes(
    labels_dir: str | Path, corpus_dir: str | Path, splits: Sequence[str] | None = None
) -> ClassRows:
    """Labeled rows of the wanted splits (all by default), with their texts.

    Raises DataError: dataset not finished, damaged, of another kind, or made of another corpus.
    ``class_shards`` takes one shard's memory.
    """
    labels, _ = _asked_classes(labels_dir, corpus_dir)
    parts = list(class_shards(labels_dir, corpus_dir, splits))
    return ClassRows(
        labels=labels,
        ids=[row_id for part in parts for row_id in part.ids],
        texts=[text for part in parts for text in part.texts],
        metas=[meta for part in parts for meta in part.metas],
        splits=np.concatenate([np.zeros(0, object), *(part.splits for part in parts)]),
        gold=np.concatenate([np.zeros(0, np.int64), *(part.gold for part in parts)]),
        logprobs=np.concatenate([np.zeros((0, len(labels))), *(part.logprobs for part in parts)]),
    )


def class_shards(
    labels_dir: str | Path, corpus_dir: str | Path, splits: Sequence[str] | None = None
) -> Iterator[ClassRows]:
    """The same, shard by shard."""
    read = ClassReader.of(labels_dir, corpus_dir, splits)
    for shard, table in shards(labels_dir):
        rows = read(shard, table)
        if len(rows):
            yield rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReader:
    """Reads labeled rows of a shard with their texts, in any process: see ``read_classes``."""

    corpus_dir: str
    labels: tuple[str, ...]
    log_prior: np.ndarray | None
    splits: tuple[str, ...] | None

    @classmethod
    def of(
        cls, labels_dir: str | Path, corpus_dir: str | Path, splits: Sequence[str] | None
    ) -> ClassReader:
        labels, log_prior = _asked_classes(labels_dir, corpus_dir)
        return cls(
            corpus_dir=Folder(corpus_dir).everywhere,
            labels=labels,
            log_prior=log_prior,
            splits=None if splits is None else tuple(splits),
        )

    def __call__(self, shard: str, labeled: pa.Table) -> ClassRows:
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.splits is not None:
            labeled = labeled.filter(pc.is_in(labeled["split"], pa.array(self.splits)))
        ids = labeled["id"].to_pylist()
        texts = _texts(self.corpus_dir, shard) if ids else {}
        index = {label: i for i, label in enumerate(self.labels)}
        flat = labeled["class_logprobs"].combine_chunks().flatten()
        logprobs = flat.to_numpy(zero_copy_only=False).reshape(len(ids), len(self.labels))
        return ClassRows(
            labels=self.labels,
            ids=ids,
            texts=[texts[row_id][0] for row_id in ids],
            metas=[texts[row_id][1] for row_id in ids],
            splits=np.array(labeled["split"].to_pylist(), dtype=object),
            gold=np.array([index.get(g, -1) for g in labeled["gold"].to_pylist()], dtype=np.int64),
            logprobs=corrected(logprobs, self.log_prior),
        )


def _asked_classes(
    labels_dir: str | Path, corpus_dir: str | Path
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The labels of a classes dataset of this corpus, and their log prior: float64[c]."""
    manifest = finished_manifest(LabelStore(labels_dir))
    identity = manifest["identity"]
    if identity["kind"] != "classes":
        raise DataError(
            f"{labels_dir} holds labels of kind {identity['kind']}, where class distributions are "
            "needed; set labels.kind: classes and label again."
        )
    check_corpus(labels_dir, identity, corpus_dir)
    prior = manifest["log_prior"]
    return tuple(identity["labels"]["classes"]), None if prior is None else np.asarray(prior)


def _finished_commits(store: LabelStore, manifest: dict[str, Any]) -> list[Commit]:
    """In corpus order."""
    commits = store.commits()
    missing = [shard for shard in manifest["shards"] if shard not in commits]
    if missing:
        raise DataError(f"{store.where}: shard {missing[0]} has no commit; run journeyman label.")
    return [commits[shard] for shard in manifest["shards"]]


def _left_out(store: LabelStore, manifest: dict[str, Any]) -> pa.Array | None:
    """Ids of the rows that filters leave out."""
    file = (manifest.get("filtered") or {}).get("file")
    return file and store.read_table(file)["id"].combine_chunks()


def _kept(table: pa.Table, left_out: pa.Array | None) -> pa.Table:
    import pyarrow.compute as pc

    if left_out is None:
        return table
    return table.filter(pc.invert(pc.is_in(table["id"], left_out)))


def _texts(corpus_dir: str | Path, shard: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Id to text and further columns."""
    table = corpus.read_shard(corpus_dir, shard)
    columns = (table[name].to_pylist() for name in ("id", "text", "meta"))
    return {
        row_id: (text, json.loads(meta) if meta else {})
        for row_id, text, meta in zip(*columns, strict=True)
    }
