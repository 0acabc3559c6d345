"""A label dataset in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from journeyman.labels import quality
from journeyman.labels.inspect.opened import Opened
from journeyman.recipe import SPLITS, Classes, Generate, Labels, Logits, Rationales

if TYPE_CHECKING:
    import pyarrow as pa

PERCENTILES = (5, 25, 50, 75, 95)
# Rows whose token distributions are decoded; a dataset's worth of them would take hours.
_DECODED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """k of n, with the exact (Clopper-Pearson) 95% interval of the rate behind it."""

    k: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, k: int, n: int) -> Share:
        from scipy.stats import binomtest

        interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="exact")
        return cls(k=k, n=n, low=float(interval.low), high=float(interval.high))

    @property
    def rate(self) -> float:
        return self.k / self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCount:
    """How often a class is the teacher's answer, the gold label, and both at once."""

    label: str
    teacher: int
    gold: int
    both: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One kind of error in quarantine: how many rows, and the first of them."""

    error_class: str
    n: int
    first_id: str
    first_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """rows = kept + filtered + quarantined, over the shards that are finished.

    filtered: by filter, rows skipped before labeling included; splits, classes, with_gold,
    quantiles and finish_reasons (of answers): of the rows kept. quantiles: by measure, at
    PERCENTILES; n_decoded: rows that the entropy of token distributions is measured on.
    """

    where: str
    kind: str
    teacher: str
    notes: tuple[str, ...]
    shards: int
    rows: int
    kept: int
    filtered: dict[str, int]
    quarantined: int
    truncated: int
    copied: int
    splits: dict[str, int]
    classes: tuple[ClassCount, ...]
    with_gold: Share | None
    quantiles: dict[str, tuple[float, ...]]
    n_decoded: int
    finish_reasons: dict[str, int]
    quarantine: tuple[Reason, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    bytes: int
    recorded_positions: int


class _Tally:
    """What is counted shard by shard."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.splits: Counter[str] = Counter()
        self.finish_reasons: Counter[str] = Counter()
        self.teacher: Counter[str] = Counter()
        self.gold: Counter[str] = Counter()
        self.both: Counter[str] = Counter()
        self.n_gold = self.n_right = 0
        self.kept = 0
        self.measures: dict[str, list[np.ndarray]] = {}
        self.recorded_positions = self.n_decoded = 0

    def add(self, table: pa.Table, n_decode: int) -> None:
        """One shard's rows; of the first n_decode the token distributions are decoded."""
        self.kept += len(table)
        self.splits.update(table["split"].to_pylist())
        self._add_answers(table)
        self._add_measures(table)
        if isinstance(self.opened.labels, Logits | Generate):
            self.recorded_positions += int(quality.floats(table, "n_positions").sum())
            self._decode(table.slice(0, n_decode))
        elif table["class_logprobs"].null_count == 0:
            entropies = quality.class_entropies(self.opened.class_logprobs(table))
            self._measure("entropy, nats", entropies)

    def _add_answers(self, table: pa.Table) -> None:
        labels = self.opened.labels
        if isinstance(labels, Logits):
            return
        answers = answers_of(self.opened, table)
        gold = table["gold"].to_pylist()
        known = [i for i, label in enumerate(gold) if label is not None]
        right = [i for i in known if _same(answers[i], gold[i], labels)]
        self.n_gold += len(known)
        self.n_right += len(right)
        if labels.kind == "classes":
            self.teacher.update(answers)
            self.gold.update(gold[i] for i in known)
            self.both.update(gold[i] for i in right)

    def _add_measures(self, table: pa.Table) -> None:
        """Each named and measured as the filter that goes by it does."""
        labels = self.opened.labels
        for column in ("label_mass", "agreement"):
            if column in table.column_names:
                self._measure(column.replace("_", " "), quality.floats(table, column))
        if not isinstance(labels, Classes):
            self._measure("tokens", quality.answer_tokens(table, labels))
        self._measure("prompt tokens", quality.floats(table, "n_prompt_tokens"))
        if isinstance(labels, Generate | Rationales):
            self.finish_reasons.update(table["finish_reason"].to_pylist())
            self._measure("repetition", quality.repetitions(table, labels))

    def _decode(self, table: pa.Table) -> None:
        codec = self.opened.codec
        if codec is not None and len(table):
            self._measure("entropy, nats", quality.token_entropies(table, codec))
            self.n_decoded += len(table)

    def _measure(self, name: str, values: np.ndarray) -> None:
        self.measures.setdefault(name, []).append(values[~np.isnan(values)].astype(np.float32))


def stats(opened: Opened) -> Stats:
    """Read every finished shard once."""
    tally = _Tally(opened)
    n_decode = -(-_DECODED // max(1, len(opened.commits)))
    for _, table in opened.shards():
        tally.add(table, n_decode)
    total = {
        name: sum(getattr(commit, name) for commit in opened.commits)
        for name in ("rows", "quarantined", "truncated", "copied", "prompt_tokens",
                     "cached_tokens", "output_tokens", "bytes")
    }  # fmt: skip
    return Stats(
        where=opened.where,
        kind=opened.labels.kind,
        teacher=opened.teacher,
        notes=opened.notes,
        shards=len(opened.commits),
        kept=tally.kept,
        filtered=_filtered(opened),
        splits={s: tally.splits[s] for s in SPLITS if tally.splits[s]},
        classes=tuple(
            ClassCount(
                label=label,
                teacher=tally.teacher[label],
                gold=tally.gold[label],
                both=tally.both[label],
            )
            for label in (opened.classes if opened.labels.kind == "classes" else ())
        ),
        with_gold=Share.of(tally.n_right, tally.n_gold) if tally.n_gold else None,
        quantiles={
            name: tuple(float(v) for v in np.percentile(np.concatenate(values), PERCENTILES))
            for name, values in tally.measures.items()
            if sum(map(len, values))
        },
        n_decoded=tally.n_decoded,
        finish_reasons=dict(tally.finish_reasons.most_common()),
        quarantine=reasons(opened),
        recorded_positions=tally.recorded_positions,
        **total,
    )


def reasons(opened: Opened) -> tuple[Reason, ...]:
    """Why rows are in quarantine, the most frequent reason first."""
    counts: Counter[str] = Counter()
    first: dict[str, tuple[str, str]] = {}
    for commit in opened.commits:
        for row in opened.store.read_quarantine(commit):
            counts[row.error_class] += 1
            first.setdefault(row.error_class, (row.id, row.message))
    return tuple(
        Reason(error_class=name, n=n, first_id=first[name][0], first_message=first[name][1])
        for name, n in counts.most_common()
    )


def answers_of(opened: Opened, table: pa.Table) -> list[str]:
    """What the teacher answers, by row: likeliest class, output, or the majority's answer."""
    if opened.labels.kind == "classes":
        return [opened.classes[i] for i in opened.class_logprobs(table).argmax(axis=1)]
    answers: list[str] = table[
        "output" if isinstance(opened.labels, Generate) else "answer"
    ].to_pylist()
    return answers


def _same(answer: str, gold: str, labels: Labels) -> bool:
    if labels.kind == "classes":
        return answer == gold
    return quality.same_answer(answer, gold, labels)


def _filtered(opened: Opened) -> dict[str, int]:
    """By filter: rows that were skipped before labeling, and those left out after it."""
    counts: Counter[str] = Counter()
    for commit in opened.commits:
        counts.update(row.filter for row in opened.store.read_filtered(commit))
    if opened.left_out is not None:
        counts.update(opened.left_out["filter"].to_pylist())
    return dict(counts.most_common())
