"""Two label datasets held against each other, row by row."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import DataError
from journeyman.labels.codec import Codec
from journeyman.labels.inspect.opened import Opened
from journeyman.labels.inspect.stats import Share, answers_of
from journeyman.recipe import Generate, Logits

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """An entry of the datasets' identities, by dotted key, that is not the same in both."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferentRow:
    """One row, what each dataset says of it, and how far apart that is; None of unlike answers
    without distributions to compare."""

    id: str
    split: str
    text: str | None
    a: str
    b: str
    distance: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What two datasets of one kind have in common.

    both, only_a, only_b: rows, as readers get them; gone_a, gone_b: why rows that the other has
    are missing here, by quarantine reason, filter, or ``not in the corpus``. same_answers: of the
    rows in both, equal likeliest class, output, answer, or (logits) equal tokens. total_variation
    and kl: mean over rows, nats, KL(A || B). logprob_max, logprob_mean: absolute difference over
    n_logprobs tokens that both store at the same position of equal tokens. most: rows of unlike
    answers, or those furthest apart by total variation or by log-probability.
    """

    where_a: str
    where_b: str
    notes_a: tuple[str, ...]
    notes_b: tuple[str, ...]
    kind: str
    settings: tuple[Setting, ...]
    both: int
    only_a: int
    only_b: int
    gone_a: dict[str, int]
    gone_b: dict[str, int]
    same_answers: Share | None
    total_variation: float | None
    kl: float | None
    logprob_max: float | None
    logprob_mean: float | None
    n_logprobs: int
    most: tuple[DifferentRow, ...]


def diff(a: Opened, b: Opened, n_rows: int = 5) -> Difference:
    """Compare b with a; raises DataError where they are of different kinds."""
    if a.labels.kind != b.labels.kind:
        raise DataError(
            f"{a.where} has {a.labels.kind} labels and {b.where} has {b.labels.kind}: only "
            "datasets of one kind can be compared."
        )
    tally = _Tally(a, b, n_rows)
    pairs = _Pairs()
    for table_a, table_b in _walk(a, b):
        if met := pairs.match(table_a, table_b):
            tally.add(*met)
    return tally.difference(pairs)


# --- bringing rows together ---


def _walk(a: Opened, b: Opened) -> Iterator[tuple[pa.Table | None, pa.Table | None]]:
    """One shard of each at a time; of one corpus, these are the same rows."""
    tables_a = (table for _, table in a.shards())
    tables_b = (table for _, table in b.shards())
    yield from zip_longest(tables_a, tables_b)


class _Pairs:
    """Rows that have met no partner yet, of each dataset."""

    def __init__(self) -> None:
        self.only_a: pa.Table | None = None
        self.only_b: pa.Table | None = None

    def match(
        self, more_a: pa.Table | None, more_b: pa.Table | None
    ) -> tuple[pa.Table, pa.Table] | None:
        """Two tables of the same ids in the same order; what is left waits for later shards."""
        import pyarrow.compute as pc

        a, b = _joined(self.only_a, more_a), _joined(self.only_b, more_b)
        self.only_a, self.only_b = a, b
        if a is None or b is None:
            return None
        place = pc.index_in(a["id"], value_set=b["id"])
        self.only_a = a.filter(pc.is_null(place))
        self.only_b = b.filter(pc.invert(pc.is_in(b["id"], value_set=a["id"])))
        return a.filter(pc.is_valid(place)), b.take(place.drop_null())


def _joined(waiting: pa.Table | None, more: pa.Table | None) -> pa.Table | None:
    import pyarrow as pa

    there = [table for table in (waiting, more) if table is not None]
    return pa.concat_tables(there) if there else None


# --- comparing them ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """n rows. same: bool[n]; distance, total_variation, kl: float64[n], a distance of inf being
    that of unlike answers; a, b: what each says.

    apart: float64[m], absolute differences of log-probabilities that both store.
    """

    same: np.ndarray
    distance: np.ndarray
    a: list[str]
    b: list[str]
    total_variation: np.ndarray | None = None
    kl: np.ndarray | None = None
    apart: np.ndarray = field(default_factory=lambda: np.empty(0))


def _compare(a: Opened, b: Opened, rows_a: pa.Table, rows_b: pa.Table) -> _Compared:
    if isinstance(a.labels, Logits | Generate):
        return _compare_tokens(a, b, rows_a, rows_b)
    answers_a, answers_b = answers_of(a, rows_a), answers_of(b, rows_b)
    same = np.array([x == y for x, y in zip(answers_a, answers_b, strict=True)], dtype=bool)
    if not _same_classes(a, b, rows_a, rows_b):
        return _Compared(same=same, distance=np.where(same, 0.0, np.inf), a=answers_a, b=answers_b)
    logprobs_a = a.class_logprobs(rows_a)
    logprobs_b = b.class_logprobs(rows_b)[:, [b.classes.index(label) for label in a.classes]]
    total_variation = np.abs(np.exp(logprobs_a) - np.exp(logprobs_b)).sum(axis=1) / 2
    return _Compared(
        same=same,
        distance=total_variation,
        a=_with_probability(answers_a, logprobs_a),
        b=_with_probability(answers_b, logprobs_b),
        total_variation=total_variation,
        kl=_kl(logprobs_a, logprobs_b),
    )


def _same_classes(a: Opened, b: Opened, rows_a: pa.Table, rows_b: pa.Table) -> bool:
    """Whether both have distributions, and over the same classes in whatever order."""
    empty = rows_a["class_logprobs"].null_count + rows_b["class_logprobs"].null_count
    return not empty and sorted(a.classes) == sorted(b.classes)


def _with_probability(answers: list[str], logprobs: np.ndarray) -> list[str]:
    top = np.exp(logprobs.max(axis=1))
    return [f"{answer} {p:.3f}" for answer, p in zip(answers, top, strict=True)]


def _kl(logprobs_a: np.ndarray, logprobs_b: np.ndarray) -> np.ndarray:
    """float64[n]: KL(A || B) in nats; a class that A rules out adds nothing."""
    possible = np.isfinite(logprobs_a)
    ratio = np.where(possible, logprobs_a, 0.0) - np.where(possible, logprobs_b, 0.0)
    return (np.exp(logprobs_a) * ratio).sum(axis=1)


def _compare_tokens(a: Opened, b: Opened, rows_a: pa.Table, rows_b: pa.Table) -> _Compared:
    codec_a, codec_b = a.codec, b.codec
    read_a, read_b = rows_a.to_pylist(), rows_b.to_pylist()
    apart = [
        _token_differences(x, y, codec_a, codec_b) if codec_a and codec_b else np.empty(0)
        for x, y in zip(read_a, read_b, strict=True)
    ]
    what = "output" if isinstance(a.labels, Generate) else "token_ids"
    same = np.array([x[what] == y[what] for x, y in zip(read_a, read_b, strict=True)], dtype=bool)
    furthest = np.array([d.max(initial=0.0) for d in apart], dtype=np.float64)
    if what == "output":
        said_a, said_b = [x[what] for x in read_a], [y[what] for y in read_b]
    else:
        said_a = [f"{x['n_tokens']} tokens" for x in read_a]
        said_b = [f"{y['n_tokens']} tokens" for y in read_b]
    return _Compared(
        same=same,
        # Rows with unlike tokens stand before all those whose log-probabilities only differ.
        distance=np.where(same, furthest, np.inf),
        a=said_a,
        b=said_b,
        apart=np.concatenate([*apart, np.empty(0)]),
    )


def _token_differences(
    a: dict[str, Any], b: dict[str, Any], codec_a: Codec, codec_b: Codec
) -> np.ndarray:
    """float64[m]: |difference| of the log-probabilities that both rows store; none for rows of
    unlike tokens. Where one records more positions, the last ones are held against each other."""
    n = min(a["n_positions"], b["n_positions"])
    if not n or codec_a.unpack_ids(a["token_ids"]).tolist() != (
        codec_b.unpack_ids(b["token_ids"]).tolist()
    ):
        return np.empty(0)
    vocab_size = max(codec_a.vocab_size, codec_b.vocab_size)
    keys_a, logprobs_a = _stored(a, codec_a, n, vocab_size)
    keys_b, logprobs_b = _stored(b, codec_b, n, vocab_size)
    _, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    return np.abs(logprobs_a[at_a] - logprobs_b[at_b])


def _stored(
    row: dict[str, Any], codec: Codec, n: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64[m], position * vocab_size + token id, and float64[m], over a row's last n positions."""
    read = codec.decode(row["logprobs"], row["n_positions"])
    ids = read.token_ids[-n:].astype(np.int64)
    there = ids >= 0
    keys = np.arange(n)[:, None] * vocab_size + ids
    return keys[there], read.logprobs[-n:][there].astype(np.float64)


# --- adding it up ---


class _Tally:
    """What is counted batch by batch."""

    def __init__(self, a: Opened, b: Opened, n_rows: int) -> None:
        self._a, self._b, self._n_rows = a, b, n_rows
        self._n = self._n_same = 0
        self._total_variation = self._kl = 0.0
        self._n_distributions = 0
        self._apart_sum = self._apart_max = 0.0
        self._n_apart = 0
        self._most: list[DifferentRow] = []

    def add(self, rows_a: pa.Table, rows_b: pa.Table) -> None:
        if not len(rows_a):
            return
        compared = _compare(self._a, self._b, rows_a, rows_b)
        self._n += len(rows_a)
        self._n_same += int(compared.same.sum())
        if compared.total_variation is not None and compared.kl is not None:
            self._n_distributions += len(rows_a)
            self._total_variation += float(compared.total_variation.sum())
            self._kl += float(compared.kl.sum())
        self._n_apart += len(compared.apart)
        self._apart_sum += float(compared.apart.sum())
        self._apart_max = max(self._apart_max, float(compared.apart.max(initial=0.0)))
        self._keep_most(rows_a, compared)

    def _keep_most(self, rows_a: pa.Table, compared: _Compared) -> None:
        furthest = np.argsort(-compared.distance, kind="stable")[: self._n_rows]
        rows = rows_a.select(["id", "split"]).take(furthest).to_pylist()
        candidates = [
            DifferentRow(
                **row,
                text=None,
                a=compared.a[i],
                b=compared.b[i],
                distance=float(d) if np.isfinite(d := compared.distance[i]) else None,
            )
            for row, i in zip(rows, furthest, strict=True)
            if compared.distance[i] > 0
        ]
        self._most = heapq.nlargest(self._n_rows, [*self._most, *candidates], key=_distance)

    def difference(self, pairs: _Pairs) -> Difference:
        ids_a, ids_b = _ids(pairs.only_a), _ids(pairs.only_b)
        n = self._n_distributions
        return Difference(
            where_a=self._a.where,
            where_b=self._b.where,
            notes_a=self._a.notes,
            notes_b=self._b.notes,
            kind=self._a.labels.kind,
            settings=tuple(
                settings_apart(self._a.manifest["identity"], self._b.manifest["identity"])
            ),
            both=self._n,
            only_a=len(ids_a),
            only_b=len(ids_b),
            gone_a=_gone(self._a, ids_b),
            gone_b=_gone(self._b, ids_a),
            same_answers=Share.of(self._n_same, self._n) if self._n else None,
            total_variation=self._total_variation / n if n else None,
            kl=self._kl / n if n else None,
            logprob_max=self._apart_max if self._n_apart else None,
            logprob_mean=self._apart_sum / self._n_apart if self._n_apart else None,
            n_logprobs=self._n_apart,
            most=tuple(_with_texts(self._a, self._most)),
        )


def _distance(row: DifferentRow) -> float:
    return np.inf if row.distance is None else row.distance


def _ids(table: pa.Table | None) -> set[str]:
    return set() if table is None else set(table["id"].to_pylist())


def _gone(opened: Opened, ids: set[str]) -> dict[str, int]:
    """Why rows that the other dataset has are missing in this one."""
    if not ids:
        return {}
    reasons: Counter[str] = Counter()
    left = set(ids)
    for row_id, reason in _set_aside(opened):
        if row_id in left:
            left.remove(row_id)
            reasons[reason] += 1
    if left:
        reasons["not in its corpus" if opened.complete else "not labeled yet"] += len(left)
    return dict(reasons.most_common())


def _set_aside(opened: Opened) -> Iterator[tuple[str, str]]:
    """Id and reason of each row that was seen and is not read."""
    for commit in opened.commits:
        for bad in opened.store.read_quarantine(commit):
            yield bad.id, f"quarantined ({bad.error_class})"
        for out in opened.store.read_filtered(commit):
            yield out.id, f"filtered ({out.filter})"
    if opened.left_out is not None:
        for row in opened.left_out.to_pylist():
            yield row["id"], f"filtered ({row['filter']})"


def settings_apart(a: Any, b: Any, key: str = "") -> Iterator[Setting]:
    """Entries of two nested mappings that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from settings_apart(
                a.get(name), b.get(name), f"{key}.{name}" if key else str(name)
            )
    elif a != b:
        yield Setting(key=key, a=a, b=b)


def _with_texts(opened: Opened, rows: list[DifferentRow]) -> Iterator[DifferentRow]:
    texts: dict[str, str] = {}
    wanted = {row.id for row in rows}
    for commit in opened.commits:
        if not wanted - texts.keys():
            break
        found = opened.corpus_rows(commit)
        texts.update({i: found[i]["text"] for i in wanted & found.keys()})
    for row in rows:
        yield replace(row, text=texts.get(row.id))
