"""Certify a student that writes: it answers the held-out rows, and what a threshold on how sure it
was of its words promises about them is a bundle.

    RUN/answers/prompts/   the held-out rows, a corpus
    RUN/answers/labels/    what the student wrote, greedily: a label dataset
    RUN/answers/teacher/   what the teacher wrote, where its labels are of given texts: another

``calibrate`` rows pick the score, ``certify`` rows carry the guarantee, ``test`` rows, if there are
any, show what came of it and decide nothing; two answers are the same as ``certify.match`` says. A
row without an answer (too long for the student, or nothing written) is one that it can never be
trusted with, and counts as different.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from journeyman import corpus, files
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import Guarantee, WrittenBundle
from journeyman.certify.curve import cost_quality_curve
from journeyman.certify.deferral_head import cross_fitted, fit_deferral_head
from journeyman.certify.guarantees import Outcomes, ScoredOutcomes, certify_kind, choose
from journeyman.certify.ledger import delta_spent, rows_digest
from journeyman.certify.recommendation import caveats, recommend
from journeyman.certify.sequence_scores import (
    FIXED,
    WrittenConfidence,
    WrittenScore,
    token_features,
)
from journeyman.certify.step import spend_rows, write_down
from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset, pipeline
from journeyman.labels.quality import same_answer
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.probabilities import FloatArray
from journeyman.recipe import Certify, Generate, Logits, Rationales, Recipe, digest
from journeyman.student import round_corpus, writing
from journeyman.teacher.rationales import parse

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
        self_agreement: mean share of the teacher's samples that say what its answer says; None
            where it gave one.
    """

    ids: list[str]
    outcomes: Outcomes
    right: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None
    lengths: npt.NDArray[np.int64]
    logprobs: FloatArray
    self_agreement: float | None

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.lengths > 0)

    @property
    def features(self) -> FloatArray:
        """float64[n, f], zeros where there is no answer."""
        of_answers = token_features(self.logprobs, self.lengths[self.answered])
        features = np.zeros((len(self.ids), of_answers.shape[1]))
        features[self.answered] = of_answers
        return features

    def scores(self, confidence: WrittenConfidence) -> FloatArray:
        """float64[n]."""
        scores = np.full(len(self.ids), NEVER)
        scores[self.answered] = confidence.of(self.logprobs, self.lengths[self.answered])
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
    return writing.asked_of_student(labels, temperature=0.0, top_p=1.0, **_BESIDE)


def inputs_digest(recipe: Recipe, labels: dict[str, Any], student: Model) -> str:
    """Of all that decides the bundle; labels: the teacher's dataset's manifest."""
    return digest([labels["digest"], labels["filtered"]["inputs"], student.weights_digest,
                   check(recipe).asked(), recipe.certify.decisive()])  # fmt: skip


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
) -> WrittenBundle:
    """Write a bundle for this student; folder: of its answers, which are made where they are not
    there for the same student and question. Ray is up.

    Raises RecipeError, DataError (an empty split, certify rows whose delta is spent), ModelError.
    """
    started = time.monotonic()
    asked = check(recipe)
    answers = _answers(recipe, asked, corpus_dir, student, folder, on_progress)
    if isinstance(recipe.labels, Logits):
        labels = _written_on(recipe, teacher, folder, on_progress)
    parts = {
        name: read(recipe, labels, answers, name)
        for name in _splits(corpus_dir)
        if name in SPLITS or _of_split(labels, name)  # of test rows all may be in quarantine
    }
    settings, certified = recipe.certify, parts["certify"]
    ledger = spend_rows(settings, certified.ids, student, out_dir)
    confidence, scored = _design(settings, parts["calibrate"], certified.outcomes)
    scores = certified.scores(confidence)
    rows = ScoredOutcomes(scores=scores, outcomes=certified.outcomes)
    certificates = [
        certify_kind(kind, scored, rows, settings.alpha, settings.delta)
        for kind in settings.guarantees
    ]
    served = certificates[0]
    curve = cost_quality_curve(scores, certified.outcomes.differs, *(certified.right or ()))
    right = parts["calibrate"].right or (None, None)
    n_groups = corpus.read_manifest(corpus_dir).get("groups", {}).get("certify")
    bundle = WrittenBundle(
        **bundles.of_models(student, teacher),
        prompt_digest=digest(asked.asked()),
        columns=tuple(corpus.prompt_columns(recipe)),
        score=confidence.score,
        deferral_head=confidence.head,
        match=settings.match,
        answer_pattern=settings.answer_pattern,
        max_tokens=asked.max_tokens,
        self_agreement=certified.self_agreement,
        threshold=served.threshold,
        served_guarantee=settings.guarantee,
        guarantees=tuple(map(Guarantee.from_certificate, certificates)),
        curve=curve.to_points(keep=served.threshold),
        student_accuracy=curve.student_accuracy,
        teacher_accuracy=curve.teacher_accuracy,
        ledger=ledger,
        recommendation=recommend(served, *right)
        + caveats(served, delta_spent(ledger, rows_digest(certified.ids)), n_groups),
    )
    with files.replaced_directory(out_dir) as fresh:
        write_down(bundle, recipe, fresh, inputs=inputs, started=started,
                   test=_realised(parts.get("test"), bundle))  # fmt: skip
    return bundle


def _splits(corpus_dir: str | Path) -> tuple[str, ...]:
    has_test = corpus.read_manifest(corpus_dir)["splits"].get("test")
    return (*SPLITS, "test") if has_test else SPLITS


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


def _answers(
    recipe: Recipe,
    asked: Generate,
    corpus_dir: str | Path,
    student: Model,
    folder: Path,
    on_progress: Callable[[LabelProgress], None],
) -> Path:
    """The student's label dataset, which goes on where it was killed."""
    words, splits = words_given(recipe), _splits(corpus_dir)
    made_of = digest([corpus.read_manifest(corpus_dir)["digest"], student.weights_digest,
                      student.tokenizer_digest, asked.asked(),
                      *([] if words is None else [words]),
                      *([] if splits == SPLITS else [splits])])  # fmt: skip
    record = folder / "answers.json"
    if not record.exists() or files.read_json(record).get("inputs") != made_of:
        files.set_aside(folder)
        files.write_json(record, {"inputs": made_of})
    prompts, labels = folder / "prompts", folder / "labels"
    if not (prompts / "manifest.json").exists():
        rows_per_shard = recipe.corpus.rows_per_shard
        round_corpus.write_splits(corpus_dir, prompts, splits, rows_per_shard, words)
    by_student = writing.written_by(recipe, student.path, asked)
    return _labeled(by_student, student, prompts, labels, on_progress)


def words_given(recipe: Recipe) -> int | None:
    """That are given of a held-out text; None: all, which requests to a cascade are, too."""
    complete = recipe.certify.complete
    return None if complete is None or recipe.corpus.feedback else complete.words


def _written_on(
    recipe: Recipe, teacher: Model, folder: Path, on_progress: Callable[[LabelProgress], None]
) -> Path:
    """The teacher's own words behind the same prompts."""
    asked = recipe.model_copy(update={"labels": question(recipe), "ensemble": {}})
    return _labeled(asked, teacher, folder / "prompts", folder / "teacher", on_progress)


def _labeled(
    asked: Recipe,
    model: Model,
    prompts: Path,
    labels: Path,
    on_progress: Callable[[LabelProgress], None],
) -> Path:
    if not dataset.is_finished(labels):
        pipeline.label(asked, model, prompts, labels, on_progress)
    return labels


def read(recipe: Recipe, labels: str | Path, answers: Path, split: str) -> WrittenRows:
    """Rows of a split that the teacher answered, with what the student wrote."""
    written = {row["id"]: row for row in _of_split(answers, split)}
    codec = dataset.codec_of(dataset.finished_manifest(LabelStore(answers)))
    assert codec is not None  # of kind generate
    same, right_by = comparison(recipe), _against_gold(recipe)
    said = "output" if isinstance(question(recipe), Generate) else "answer"
    ids, differs, right, gold, lengths, logprobs, agreements = [], [], [], [], [], [], []
    for row in _of_split(labels, split):
        own = written.get(row["id"])
        n_tokens = own["n_positions"] if own else 0
        ids.append(row["id"])
        lengths.append(n_tokens)
        answer = own["output"] if own and n_tokens else None
        differs.append(answer is None or not same(answer, row[said]))
        gold.append(row["gold"] is not None)
        right.append((right_by(answer, row["gold"]), right_by(row[said], row["gold"])))
        if own and n_tokens:
            logprobs.append(codec.decode(own["logprobs"], n_tokens).logprobs[:, 0])
        if len(row.get("answers") or ()) > 1:
            agreements.append(row["agreement"])
    if not ids:
        raise DataError(
            f"split {split} has no labeled rows; give it some with corpus.split_map or "
            "corpus.shares."
        )
    by_student, by_teacher = np.array(right, dtype=np.bool_).T
    has_gold = np.array(gold, dtype=np.bool_)
    return WrittenRows(
        ids=ids,
        outcomes=Outcomes(
            differs=np.array(differs, dtype=np.bool_),
            losses=by_teacher.astype(np.int64) - by_student.astype(np.int64),
            has_gold=has_gold,
        ),
        right=(by_student, by_teacher) if has_gold.all() else None,
        lengths=np.array(lengths, dtype=np.int64),
        logprobs=np.concatenate([np.empty(0), *logprobs]).astype(np.float64),
        self_agreement=float(np.mean(agreements)) if agreements else None,
    )


def _of_split(labels: str | Path, split: str) -> list[dict[str, Any]]:
    import pyarrow.compute as pc

    table = dataset.read(labels)
    rows: list[dict[str, Any]] = table.filter(pc.equal(table["split"], split)).to_pylist()
    return rows


def comparison(recipe: Recipe) -> Callable[[str, str], bool]:
    """Whether two answers are one, by ``certify.match``."""
    labels, parsed = question(recipe), _parser(recipe)
    if parsed is None:
        return lambda one, other: same_answer(one, other, labels)
    return lambda one, other: parsed(one) is not None and parsed(one) == parsed(other)


def _against_gold(recipe: Recipe) -> Callable[[str | None, str | None], bool]:
    """Whether an answer is the gold one, which may be what the pattern is to find."""
    labels, parsed = question(recipe), _parser(recipe)

    def right(answer: str | None, gold: str | None) -> bool:
        if answer is None or gold is None:
            return False
        if parsed is None:
            return same_answer(answer, gold, labels)
        return parsed(answer) is not None and parsed(answer) in (gold.strip(), parsed(gold))

    return right


def _parser(recipe: Recipe) -> Callable[[str], str | None] | None:
    if recipe.certify.answer_pattern is None:
        return None
    pattern = re.compile(recipe.certify.answer_pattern)
    number = isinstance(recipe.labels, Rationales) and recipe.labels.number
    return lambda text: parse(text, pattern, number)[0]


def _design(
    settings: Certify, calibrate: WrittenRows, certify_rows: Outcomes
) -> tuple[WrittenConfidence, ScoredOutcomes]:
    """How answers are scored, by calibrate rows alone; these rows by that score."""
    outcomes, answered = calibrate.outcomes, calibrate.answered
    costs, counted = outcomes.to_learn_from(settings.guarantee)
    candidates = {name: calibrate.scores(WrittenConfidence(score=name)) for name in FIXED}
    known = counted & answered
    if known.sum() > 1:
        held_out = cross_fitted(calibrate.features, costs > 0, known)
        candidates["deferral_head"] = np.where(answered, held_out, NEVER)
    name: WrittenScore
    name, scored = choose(
        settings.guarantee, candidates, outcomes, certify_rows, settings.alpha, settings.delta
    )
    head = None
    if name == "deferral_head":
        head = fit_deferral_head(calibrate.features[known], costs[known] > 0)
    return WrittenConfidence(score=name, head=head), scored
