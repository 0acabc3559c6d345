"""Certify a student that writes: it answers the held-out rows, and what a threshold on how sure it
was of its words promises about them is a bundle.

``written_answers`` has what was written. ``calibrate`` rows pick the score, ``certify`` rows carry
the guarantee, ``test`` rows, if there are any, show what came of it and decide nothing; two answers
are the same as ``certify.match`` says. A row without an answer (too long for the student, or
nothing written) is one that it can never be trusted with, and counts as different.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from journeyman import corpus, files, models
from journeyman.certify import bundle as bundles
from journeyman.certify import consistency, judging, matching
from journeyman.certify.bundle import Guarantee, JudgeRecord, Samples, WrittenBundle
from journeyman.certify.certificate import Certificate
from journeyman.certify.curve import cost_quality_curve
from journeyman.certify.deferral_head import cross_fitted, fit_deferral_head
from journeyman.certify.guarantees import Outcomes, ScoredOutcomes, certify_kind, choose
from journeyman.certify.judging import Verdicts
from journeyman.certify.matching import Same
from journeyman.certify.recommendation import caveats, recommend, repeated
from journeyman.certify.row_answers import RowAnswers, row_answers, rows_of
from journeyman.certify.sequence_scores import (
    FIXED,
    LEARNED,
    SAMPLED,
    WrittenConfidence,
    answer_features,
)
from journeyman.certify.spending import spend_rows
from journeyman.certify.step import times, write_down
from journeyman.certify.written_answers import (
    OF_JUDGE,
    OF_STUDENT,
    OF_TEACHER,
    HeldOut,
    held_out_splits,
    of_samples,
)
from journeyman.errors import DataError, RecipeError
from journeyman.folder import Folder
from journeyman.models import Model
from journeyman.probabilities import FloatArray
from journeyman.recipe import Certify, Generate, Logits, Rationales, Recipe, digest
from journeyman.student import writing

if TYPE_CHECKING:
    from journeyman.labels.progress import LabelProgress

SPLITS = ("calibrate", "certify")
NEVER = -1e6  # the score of a row without an answer; a float16's log-probability is above -65,505
_BESIDE = {"structured": None}  # masked tokens are not the likeliest, whose probability is stored


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRows:
    """Rows of a split as teacher and student answered them.

    Attributes:
        ids: of the rows.
        outcomes: what each costs if the student answers it.
        right: against gold, bool[n] each: the student's answer and the teacher's; None unless all
            rows have gold.
        lengths: int64[n], tokens that the student wrote; 0 where it has no answer.
        logprobs: float64[sum of lengths], of each of them, one row after the other.
        agreements: float64[a], of the rows that it has an answer for: the share of that answer and
            its samples that say the same; None where none were drawn.
        self_agreement: mean share of the teacher's samples that say what its answer says; None
            where it gave one.
    """

    ids: list[str]
    outcomes: Outcomes
    right: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None
    lengths: npt.NDArray[np.int64]
    logprobs: FloatArray
    agreements: FloatArray | None
    self_agreement: float | None

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.lengths > 0)

    def features(self, *, sampled: bool) -> FloatArray:
        """float64[n, f], zeros where there is no answer; sampled: with the samples' agreement."""
        of_samples = self.agreements if sampled else None
        of_answers = answer_features(self.logprobs, self.lengths[self.answered], of_samples)
        features = np.zeros((len(self.ids), of_answers.shape[1]))
        features[self.answered] = of_answers
        return features

    def scores(self, confidence: WrittenConfidence) -> FloatArray:
        """float64[n]."""
        scores = np.full(len(self.ids), NEVER)
        scores[self.answered] = confidence.of(
            self.logprobs, self.lengths[self.answered], self.agreements
        )
        return scores


def question(recipe: Recipe) -> Generate | Rationales:
    """What the teacher answers, and a cascade does; raises RecipeError where there is nothing."""
    labels, complete = recipe.labels, recipe.certify.complete
    if isinstance(labels, Generate | Rationales):
        return labels
    if not isinstance(labels, Logits) or complete is None:
        raise RecipeError(
            "a cascade answers requests, and labels of given texts (labels.kind: logits) hold no "
            "answers; say what is to be written: certify.complete: {words: 8, max_tokens: 8}."
        )
    if bool(labels.context) == (complete.words is not None) or labels.tokens:
        raise RecipeError(
            "certify.complete: give words where nothing stands in front of the text, and leave "
            "them out where labels.context does; labels.tokens has no text to write on."
        )
    shared = {n: getattr(labels, n) for n in Generate.model_fields if hasattr(labels, n)}
    changes = {"kind": "generate", "max_tokens": complete.max_tokens, **writing.ALONE}
    prompt = labels.context or "{{ text }}"
    return Generate.model_validate(shared | changes | {"prompt": prompt})


def check(recipe: Recipe) -> Generate:
    """What the student is asked; raises RecipeError where it cannot be certified."""
    labels, settings = question(recipe), recipe.certify
    if settings.per_class:
        raise RecipeError("certify.per_class is for classes; this student writes.")
    if isinstance(labels, Generate) and labels.structured is not None:
        raise RecipeError(
            "labels.structured: how sure a student is of tokens that it was made to write is not "
            "in its labels; certify without it, or as labels.kind: classes."
        )
    if recipe.run_url:
        raise RecipeError(
            "certify keeps what the student writes below output, which must be a folder on a disk "
            "that all nodes share, for a student that writes."
        )
    if settings.match == "judge":
        judging.teacher_of(recipe)
    return writing.asked_of_student(labels, temperature=0.0, top_p=1.0, **_BESIDE)


def inputs_digest(recipe: Recipe, labels: dict[str, Any], student: Model) -> str:
    """Of all that decides the bundle; labels: the teacher's dataset's manifest."""
    other = recipe.certify.judge.teacher
    return digest([labels["digest"], labels["filtered"]["inputs"], student.weights_digest,
                   check(recipe).asked(), recipe.certify.decisive(),
                   *([models.teacher(other).weights_digest] if other else [])])  # fmt: skip


def certify(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: str | Path,
    student: Model,
    teacher: Model,
    folder: Path,
    out_dir: Path,
    *,
    inputs: str,
    on_progress: Callable[[LabelProgress], None],
    shared: Folder | None = None,
) -> WrittenBundle:
    """Write a bundle for this student; folder: of its answers, which are made where they are not
    there for the same student and question; shared: the ledger of runs beside it. Ray is up.

    Raises RecipeError, DataError (an empty split, certify rows whose delta is spent), ModelError.
    """
    started = time.monotonic()
    settings, asked, splits = recipe.certify, check(recipe), held_out_splits(corpus_dir)
    held_out = HeldOut(
        recipe=recipe, asked=asked, splits=splits, folder=folder, on_progress=on_progress
    )
    parts, judge = _parts(held_out, labels, corpus_dir, student, teacher)
    certified = parts["certify"]
    confidence, certificates = _decide(settings, parts["calibrate"], certified)
    ids = {split: part.ids for split, part in parts.items()}
    ledger = spend_rows(recipe, ids, [student], certificates, out_dir, shared)
    served, scores = certificates[0], certified.scores(confidence)
    curve = cost_quality_curve(scores, certified.outcomes.differs, *(certified.right or ()))
    n_groups = corpus.read_manifest(corpus_dir).get("groups", {}).get("certify")
    n_times = times(corpus.repeats(corpus_dir, "certify"), certified.ids)
    bundle = WrittenBundle(
        **bundles.of_models(student, teacher),
        prompt_digest=digest(asked.asked()),
        columns=(columns := tuple(corpus.prompt_columns(recipe))),
        longest=held_out.longest([i for part in ids.values() for i in part], columns),
        score=confidence.score,
        deferral_head=confidence.head,
        samples=(taken := _samples(settings) if confidence.score in SAMPLED else None),
        match=settings.match,
        answer_pattern=settings.answer_pattern,
        judge=judge,
        max_tokens=asked.max_tokens,
        self_agreement=certified.self_agreement,
        threshold=served.threshold,
        served_guarantee=settings.guarantee,
        guarantees=tuple(map(Guarantee.from_certificate, certificates)),
        curve=curve.to_points(keep=served.threshold),
        student_accuracy=curve.student_accuracy,
        teacher_accuracy=curve.teacher_accuracy,
        ledger=ledger.entries,
        recommendation=recommend(served, *(parts["calibrate"].right or (None, None)))
        + caveats(served, ledger.delta_promised(certified.ids), n_groups)
        + repeated(served, n_times, scores, certified.outcomes.differs)
        + judging.words(judge, recipe)
        + consistency.cost(taken),
    )
    with files.replaced_directory(out_dir) as fresh:
        write_down(bundle, ledger, recipe, fresh, inputs=inputs, started=started,
                   test=_realised(parts.get("test"), bundle))  # fmt: skip
    return bundle


def _parts(
    held_out: HeldOut, labels: str | Path, corpus_dir: str | Path, student: Model, teacher: Model
) -> tuple[dict[str, WrittenRows], JudgeRecord | None]:
    """The rows of each split, with all that besides the student's answers has to be written for
    them; and who judged them, if anybody did."""
    recipe, samples = held_out.recipe, _samples(held_out.recipe.certify)
    answers = held_out.by_student(corpus_dir, student)
    drawn = held_out.sampled(student, samples) if samples else None
    if isinstance(recipe.labels, Logits):
        labels = held_out.by_teacher(teacher, question(recipe))
    verdicts, judge = _judged(held_out, labels, answers, teacher)
    parts = {
        name: read(recipe, labels, answers, name, drawn, verdicts)
        for name in held_out.splits
        if name in SPLITS or rows_of(labels, name)  # of test rows all may be in quarantine
    }
    return parts, judge


def _samples(settings: Certify) -> Samples | None:
    """That are drawn for a certificate."""
    if not settings.samples:
        return None
    return Samples(n=settings.samples, temperature=settings.sample_temperature)


def _realised(rows: WrittenRows | None, bundle: WrittenBundle) -> dict[str, int] | None:
    """How many test rows there are, how many the student answers, and how many of those otherwise
    than the teacher; with gold also how many each gets right, and the cascade."""
    if rows is None:
        return None
    accepted = rows.scores(bundle.confidence) > bundle.accept_above
    found = {
        "n": len(rows.ids),
        "n_accepted": int(accepted.sum()),
        "n_accepted_differs": int((accepted & rows.outcomes.differs).sum()),
    }
    if rows.right is None:
        return found
    student, teacher = rows.right
    return found | {
        "student": int(student.sum()),
        "teacher": int(teacher.sum()),
        "cascade": int(np.where(accepted, student, teacher).sum()),
    }


def read(
    recipe: Recipe,
    labels: str | Path,
    answers: Path,
    split: str,
    drawn: Path | None = None,
    verdicts: Verdicts | None = None,
) -> WrittenRows:
    """Rows of a split that the teacher answered, with what the student wrote; drawn: the dataset of
    its samples, if there is one; verdicts: of the judge, if one is asked."""
    rows = row_answers(question(recipe), labels, answers, split)
    if not rows:
        raise DataError(
            f"split {split} has no labeled rows; give it some with corpus.split_map or "
            "corpus.shares."
        )
    by_text = comparison(recipe)
    right = matching.against_gold(recipe.certify, question(recipe))

    def same(row: RowAnswers, answer: str | None) -> bool:
        """Whether it is the teacher's."""
        if answer is None or by_text(answer, row.teacher):
            return answer is not None
        return verdicts is not None and verdicts.same(row.id, answer, row.teacher)

    by_student = np.array([right(row.student, row.gold) for row in rows])
    by_teacher = np.array([right(row.teacher, row.gold) for row in rows])
    has_gold = np.array([row.gold is not None for row in rows])
    own = [float(np.mean([same(row, one) for one in row.samples])) if verdicts else row.agreement
           for row in rows if row.agreement is not None]  # fmt: skip
    return WrittenRows(
        ids=[row.id for row in rows],
        outcomes=Outcomes(
            differs=np.array([not same(row, row.student) for row in rows], dtype=np.bool_),
            losses=by_teacher.astype(np.int64) - by_student.astype(np.int64),
            has_gold=has_gold,
        ),
        right=(by_student, by_teacher) if has_gold.all() else None,
        lengths=np.array([len(row.logprobs) for row in rows], dtype=np.int64),
        logprobs=np.concatenate([row.logprobs for row in rows]).astype(np.float64),
        agreements=_agreements(recipe, rows, drawn, by_text) if drawn else None,
        self_agreement=float(np.mean(own)) if own else None,
    )


def read_certified(recipe: Recipe, labels: str | Path, folder: Path, split: str) -> WrittenRows:
    """The same from the datasets that ``certify`` left in the folder; labels: the recipe's."""
    samples = _samples(recipe.certify)
    return read(
        recipe,
        of_teacher(recipe, labels, folder),
        folder / OF_STUDENT,
        split,
        folder / of_samples(samples) if samples else None,
        Verdicts.read(folder / OF_JUDGE) if recipe.certify.match == "judge" else None,
    )


def of_teacher(recipe: Recipe, labels: str | Path, folder: Path) -> str | Path:
    """Where the teacher's answers are; labels: the recipe's."""
    return folder / OF_TEACHER if isinstance(recipe.labels, Logits) else labels


def _agreements(recipe: Recipe, rows: list[RowAnswers], drawn: Path, same: Same) -> FloatArray:
    samples = consistency.read(drawn)
    answered = [(row.student, samples.get(row.id, ())) for row in rows if row.student is not None]
    said, besides = [answer for answer, _ in answered], [drawn for _, drawn in answered]
    return consistency.agreements(said, besides, recipe.certify.samples, same)


def _judged(
    held_out: HeldOut, labels: str | Path, answers: Path, teacher: Model
) -> tuple[Verdicts, JudgeRecord] | tuple[None, None]:
    """What the judge says of the answers that are worded differently, and who it is; nothing where
    none is asked. Raises DataError where that tells nothing."""
    recipe, settings = held_out.recipe, held_out.recipe.certify
    if settings.match != "judge":
        return None, None
    asked_about, same = question(recipe), comparison(recipe)
    asked = judging.asked_of_judge(recipe, asked_about)
    judge = models.teacher(settings.judge.teacher) if settings.judge.teacher else teacher
    rows = {name: row_answers(asked_about, labels, answers, name) for name in held_out.splits}
    pairs = judging.pairs_of_answers(rows, same, "certify")
    known = judging.controls(rows["calibrate"], same, settings.judge.controls, "calibrate")
    judging.check_measurable(known)
    both_orders = judging.corpus_rows([*pairs, *known], held_out.prompts, asked_about)
    teacher_settings = judging.teacher_of(recipe)
    verdicts = Verdicts.read(held_out.judged(asked, teacher_settings, judge, both_orders))
    return verdicts, verdicts.record(judge, asked, known, len(pairs))


def comparison(recipe: Recipe) -> Same:
    """Whether two answers are one by ``certify.match``, without asking a judge."""
    return matching.by_text(recipe.certify, question(recipe))


def _decide(
    settings: Certify, calibrate: WrittenRows, certified: WrittenRows
) -> tuple[WrittenConfidence, list[Certificate]]:
    """How answers are scored, and the certificates, the served one first."""
    confidence, scored = _design(settings, calibrate, certified.outcomes)
    rows = ScoredOutcomes(scores=certified.scores(confidence), outcomes=certified.outcomes)
    certificates = [
        certify_kind(kind, scored, rows, settings.alpha, settings.delta)
        for kind in settings.guarantees
    ]
    return confidence, certificates


def _design(
    settings: Certify, calibrate: WrittenRows, certify_rows: Outcomes
) -> tuple[WrittenConfidence, ScoredOutcomes]:
    """How answers are scored, by calibrate rows alone; these rows by that score."""
    outcomes, answered = calibrate.outcomes, calibrate.answered
    costs, counted = outcomes.to_learn_from(settings.guarantee)
    fixed = FIXED if calibrate.agreements is None else (*FIXED, "self_consistency")
    candidates = {name: calibrate.scores(WrittenConfidence(score=name)) for name in fixed}
    known = counted & answered
    learned = ("deferral_head",) if calibrate.agreements is None else LEARNED
    for name in learned if known.sum() > 1 else ():
        features = calibrate.features(sampled=name in SAMPLED)
        candidates[name] = np.where(answered, cross_fitted(features, costs > 0, known), NEVER)
    name, scored = choose(
        settings.guarantee, candidates, outcomes, certify_rows, settings.alpha, settings.delta
    )
    head = None
    if name in LEARNED:
        features = calibrate.features(sampled=name in SAMPLED)
        head = fit_deferral_head(features[known], costs[known] > 0)
    return WrittenConfidence(score=name, head=head), scored
