"""``certify.match: judge``: whether two answers that are worded differently mean the same, as a
model says that reads both.

Owns which pairs are asked about, how, what the verdicts are, and how far they can be believed. Each
pair is asked about in both orders, since judges favour a place (Zheng et al. 2023, Judging
LLM-as-a-Judge with MT-Bench and Chatbot Arena), and agrees only if both say so. The judge's own
error is measured without gold, on calibrate rows: on answers to different requests, which differ,
and on answers whose form alone was changed, which do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from journeyman import corpus
from journeyman.certify.bundle import JudgeRecord, Rate
from journeyman.certify.certificate import clopper_pearson_interval
from journeyman.certify.matching import Same
from journeyman.certify.row_answers import RowAnswers
from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Classes, Generate, Rationales, Recipe, Teacher, digest
from journeyman.teacher.classes import prompting
from journeyman.teacher.prompting import Prompting
from journeyman.teacher.tasks import prompt_digest, row_values

Known = Literal["same", "different"]
_SAME: Known = "same"
_DIFFERENT: Known = "different"
_CHANCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to a row's request; known: what they are, of pairs that measure the judge."""

    row: str
    split: str
    one: str
    other: str
    known: Known | None = None


def teacher_of(recipe: Recipe) -> Teacher:
    """Settings of the model that judges; raises RecipeError where it cannot be asked."""
    settings = recipe.certify.judge.teacher or recipe.teacher
    if settings.column:
        raise RecipeError(
            "certify.match: judge asks a model, and teacher.column holds words that were written "
            "before: name one in certify.judge.teacher: {model: ...}."
        )
    return settings


def teacher_judges(recipe: Recipe) -> bool:
    """Whether the recipe's teacher judges, as it is set up to answer: serving can ask it then."""
    return recipe.certify.judge.teacher in (None, recipe.teacher)


def asked_of_judge(recipe: Recipe, question: Generate | Rationales) -> Classes:
    """What the judge is asked of a pair; question: that the pair answers."""
    judge, teacher = recipe.certify.judge, teacher_of(recipe)
    return Classes(
        classes={_SAME: judge.same, _DIFFERENT: judge.different},
        scoring="direct" if teacher.url else "verbalizer",
        prompt=judge.prompt,
        chat=question.chat if judge.chat is None else judge.chat,
        prior_correction="none",
        max_quarantined=1.0,
    )


def pairs_of_answers(
    rows: Mapping[str, Sequence[RowAnswers]], same: Same, floor_of: str
) -> list[Pair]:
    """The pairs that are not the same by their text: of student and teacher in each split, and of
    the teacher's samples and its answer in the split ``floor_of``."""
    pairs = [
        Pair(row=row.id, split=split, one=answer, other=row.teacher)
        for split, some in rows.items()
        for row in some
        for answer in (row.student, *(row.samples if split == floor_of else ()))
        if answer is not None and not same(answer, row.teacher)
    ]
    return list(dict.fromkeys(pairs))


def controls(rows: Sequence[RowAnswers], same: Same, n: int, split: str) -> list[Pair]:
    """At most n pairs that are known to differ, and as many that are known to mean the same.

    Differing: the teacher's answer to a row and the student's to the next one, unless that is by
    its text the teacher's or the student's to this one. The same: the teacher's answer and itself
    in another form.
    """
    answered = [row for row in rows if row.student is not None]
    unlike = [
        Pair(row=row.id, split=split, one=other.student, other=row.teacher, known=_DIFFERENT)
        for row, other in zip(answered, [*answered[1:], *answered[:1]], strict=True)
        if row.student is not None and other.student is not None
        and not same(other.student, row.teacher) and not same(other.student, row.student)
    ]  # fmt: skip
    alike = [
        Pair(row=row.id, split=split, one=reformed(row.teacher), other=row.teacher, known=_SAME)
        for row in rows
        if row.teacher.strip()
    ]
    return [*unlike[:n], *alike[:n]]


def reformed(answer: str) -> str:
    """An answer in another form that means the same: blanks doubled, a line of its own, and a full
    stop where there was none, or none where there was one."""
    words = "  ".join(answer.split())
    return f"\n{words[:-1] if words.endswith('.') else f'{words}.'}\n"


def corpus_rows(
    pairs: Sequence[Pair], prompts: Path, question: Generate | Rationales
) -> list[dict[str, Any]]:
    """Both orders of each pair as rows of a corpus, with the columns ``request``, ``first`` and
    ``second`` beside those of its own row in ``prompts``; what is known of it is its gold label."""
    asked, sources = prompting(question), corpus.by_id(prompts)
    rows = {}
    for pair in pairs:
        text, meta = sources[pair.row]
        for read in both_orders(row_values(text, meta), pair.one, pair.other, asked):
            row_id = _id(pair.row, read["first"], read["second"])
            beside = {name: value for name, value in read.items() if name != "text"}
            rows[row_id] = {
                "id": row_id, "text": text, "label": pair.known, "split": pair.split,
                "meta": json.dumps(beside, ensure_ascii=False), "count": 1,
            }  # fmt: skip
    return list(rows.values())


def both_orders(
    row: Mapping[str, Any], one: str, other: str, asked: Prompting
) -> list[dict[str, Any]]:
    """What the judge reads of two answers to a row, in each order; asked: how the row was put to
    those who answered."""
    request = asked.render(row).text
    return [
        {**row, "request": request, "first": first, "second": second}
        for first, second in ((one, other), (other, one))
    ]


def check_measurable(known: Sequence[Pair]) -> None:
    """Raises DataError where nothing is known of any pair."""
    if {pair.known for pair in known} != {_SAME, _DIFFERENT}:
        raise DataError(
            "certify.match: judge: its error is measured on calibrate rows whose answers differ "
            "from one another, and there are none; give that split more rows, or compare by exact "
            "or parsed."
        )


def p_same(classes: Sequence[str], class_logprobs: Sequence[float]) -> float:
    """Probability that the first answer means what the second does; classes: that the judge was
    asked for, in order."""
    return math.exp(class_logprobs[classes.index(_SAME)])


def mean_the_same(both: Iterable[float | None]) -> bool:
    """Whether both orders say so; both: ``p_same`` of each, None without a verdict (too long for
    the judge, say), which makes the answers different."""
    return all(value is not None and value > _CHANCE for value in both)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the judge said: probability that the first answer means what the second does, by the ids
    of its corpus rows."""

    p_same: Mapping[str, float]

    @classmethod
    def read(cls, labels: Path) -> Verdicts:
        """Raises DataError."""
        classes = [*dataset.finished_manifest(LabelStore(labels))["identity"]["labels"]["classes"]]
        table = dataset.read(labels).select(["id", "class_logprobs"])
        return cls({r["id"]: p_same(classes, r["class_logprobs"]) for r in table.to_pylist()})

    def same(self, row: str, one: str, other: str) -> bool:
        orders = (one, other), (other, one)
        return mean_the_same(self.p_same.get(_id(row, *order)) for order in orders)

    def record(
        self, judge: Model, asked: Classes, pairs: Sequence[Pair], n_asked: int
    ) -> JudgeRecord:
        """Who judged, and its error on the pairs that something is known of.

        Raises DataError where its verdicts tell nothing.
        """
        known = {what: [pair for pair in pairs if pair.known == what]
                 for what in (_SAME, _DIFFERENT)}  # fmt: skip
        said_same = {what: sum(self.same(pair.row, pair.one, pair.other) for pair in some)
                     for what, some in known.items()}  # fmt: skip
        n_unlike, n_alike = len(known[_DIFFERENT]), len(known[_SAME])
        record = JudgeRecord(
            model=judge.reference,
            model_digest=judge.weights_digest,
            prompt_digest=prompt_digest(asked),
            n_pairs=n_asked,
            false_agreement=_rate(said_same[_DIFFERENT], n_unlike),
            false_difference=_rate(n_alike - said_same[_SAME], n_alike),
        )
        if record.false_agreement.high >= min(_CHANCE, 1 - record.false_difference.high):
            raise DataError(
                f"certify.match: judge: {_errors(record)}, which tells nothing: name a stronger "
                "model in certify.judge.teacher, ask it in another way (certify.judge.prompt), "
                "give it more calibrate rows to be measured on, or compare by exact or parsed."
            )
        return record


def words(record: JudgeRecord | None, recipe: Recipe) -> str:
    """What a promise by a judge's verdicts is worth, as sentences behind others; empty without."""
    if record is None:
        return ""
    watched = (
        "Audits ask the teacher in the same way."
        if teacher_judges(recipe)
        else "Serving does not run this judge: audits are kept for the next certificate, and do "
        "not watch over this one."
    )
    return (
        f" What differs is what a judge says ({record.n_pairs:,} pairs of answers, each in both "
        f"orders): the promise is about its verdicts. {_errors(record)}. {watched}"
    )


def _errors(record: JudgeRecord) -> str:
    unlike, alike = record.false_agreement, record.false_difference
    return (
        f"The judge {record.model} took {unlike.count:,} of {unlike.n:,} pairs of answers to "
        f"different requests for the same (95%: {unlike.low:.1%} to {unlike.high:.1%}), and "
        f"{alike.count:,} of {alike.n:,} answers in another form for different ones (95%: "
        f"{alike.low:.1%} to {alike.high:.1%})"
    )


def _rate(count: int, n: int) -> Rate:
    """With its exact two-sided 95% interval (Clopper and Pearson 1934)."""
    low, high = clopper_pearson_interval(count, n)
    return Rate(count=count, n=n, low=low, high=high)


def _id(row: str, first: str, second: str) -> str:
    return digest([row, first, second])
