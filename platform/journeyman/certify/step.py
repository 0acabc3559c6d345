"""The certify step: a student, its labels and a recipe in; a policy bundle out.

``calibrate`` rows fit the temperature and pick the score, ``certify`` rows carry the guarantee,
``test`` rows are scored for the report and decide nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from journeyman import corpus, files
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import Bundle, Guarantee, PolicyBundle
from journeyman.certify.calibration import Calibrator, fit_temperature
from journeyman.certify.certificate import Certificate
from journeyman.certify.confidence import Confidence
from journeyman.certify.curve import cost_quality_curve
from journeyman.certify.deferral_head import class_features, cross_fitted, fit_deferral_head
from journeyman.certify.guarantees import Outcomes, ScoredOutcomes, certify_kind, choose
from journeyman.certify.ledger import LedgerEntry, delta_spent, rows_digest, spend
from journeyman.certify.mixture import Mixture, fit_mixture
from journeyman.certify.per_class import certify_each_class
from journeyman.certify.recommendation import caveats, recommend
from journeyman.certify.scores import ScoreName, refined, score
from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model
from journeyman.probabilities import IntArray
from journeyman.recipe import Certify, Recipe
from journeyman.student.inputs import Input, Inputs
from journeyman.teacher.tasks import prompt_digest

RECIPE_FILE = "recipe.json"
SCORED_FILE = "test.npz"


class StudentScorer(Protocol):
    """What certification needs of a student: see ``student.models.Classifier``."""

    def logits(self, texts: Sequence[Input], batch_size: int = 32) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Rows as teacher and student see them.

    teacher: float64[n, c], probabilities, prior corrected; logits: float32[n, c], the student's;
    mixed: float64[n, c], what an escalated row is answered with, None where that is the teacher's.
    """

    rows: ClassRows
    logits: npt.NDArray[np.float32]
    mixed: npt.NDArray[np.float64] | None = None

    @property
    def teacher(self) -> npt.NDArray[np.float64]:
        return np.exp(self.rows.logprobs)

    @property
    def escalated(self) -> IntArray:
        """int64[n]: the answer that each row has if it is escalated."""
        opinion = self.rows.logprobs if self.mixed is None else self.mixed
        return np.asarray(opinion.argmax(axis=1))

    @property
    def differs(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.logits.argmax(axis=1) != self.escalated)

    @property
    def outcomes(self) -> Outcomes:
        """What each row costs if the student answers it."""
        gold = self.rows.gold
        student_right = self.logits.argmax(axis=1) == gold
        escalated_right = self.escalated == gold
        return Outcomes(
            differs=self.differs,
            losses=escalated_right.astype(np.int64) - student_right.astype(np.int64),
            has_gold=gold >= 0,
        )

    def right(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None:
        """Against gold, bool[n] each: the student's answers, and those of escalated rows; None
        unless all have it."""
        gold = self.rows.gold
        if not len(gold) or (gold < 0).any():
            return None
        return self.logits.argmax(axis=1) == gold, self.escalated == gold

    def right_where_known(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The same of the rows that have gold: bool[m] each."""
        known = self.rows.gold >= 0
        gold = self.rows.gold[known]
        return self.logits.argmax(axis=1)[known] == gold, self.escalated[known] == gold


def certify(
    recipe: Recipe,
    rows: ClassRows,
    log_prior: Sequence[float] | None,
    scorer: StudentScorer,
    student: Model,
    teacher: Model,
    out_dir: Path,
    *,
    inputs: str,
    n_groups: int | None = None,
) -> PolicyBundle:
    """Write a bundle for this student; rows: of calibrate, certify and test.

    inputs: digest of all that the bundle is made of, for the step's manifest; n_groups: how many
    groups the certify rows are of, None where they are in none.
    Raises DataError: an empty split, or certify rows whose delta is spent.
    """
    started = time.monotonic()
    inputs_of = Inputs(recipe.learner())
    parts = {
        name: _scored(rows, name, inputs_of, scorer) for name in ("calibrate", "certify", "test")
    }
    mixture, parts = _mix(parts) if recipe.cascade.combine == "mixture" else (None, parts)
    settings, certified = recipe.certify, parts["certify"]
    ledger = spend_rows(settings, certified.rows.ids, student, out_dir)
    confidence, certificates, of_classes = decide(settings, parts["calibrate"], certified)
    scores = confidence.of(certified.logits)[1]
    served = certificates[0]
    curve = cost_quality_curve(scores, certified.differs, *(certified.right() or ()))
    own, right = confidence.class_thresholds, parts["calibrate"].right_where_known()
    whose = "the mixture's" if mixture else "the teacher's"
    bundle = PolicyBundle(
        **bundles.of_models(student, teacher),
        prompt_digest=prompt_digest(recipe.classes()),
        columns=tuple(corpus.prompt_columns(recipe)),
        label_names=rows.labels,
        score=confidence.score,
        deferral_head=confidence.head,
        class_thresholds=None if own is None else tuple(own.tolist()),
        temperature=confidence.calibrator.temperature,
        teacher_log_prior=None if log_prior is None else tuple(log_prior),
        mixture=mixture,
        threshold=served.threshold,
        served_guarantee=settings.guarantee,
        guarantees=tuple(map(Guarantee.from_certificate, certificates)),
        class_guarantees=of_classes and tuple(map(Guarantee.from_certificate, of_classes)),
        curve=curve.to_points(keep=served.threshold),
        student_accuracy=curve.student_accuracy,
        teacher_accuracy=curve.teacher_accuracy,
        ledger=ledger,
        recommendation=recommend(served, right[0], right[1], whose)
        + caveats(served, delta_spent(ledger, rows_digest(certified.rows.ids)), n_groups),
    )
    with files.replaced_directory(out_dir) as fresh:
        np.savez(fresh / SCORED_FILE, logits=parts["test"].logits)
        write_down(bundle, recipe, fresh, inputs=inputs, started=started)
    return bundle


def write_down(
    bundle: Bundle,
    recipe: Recipe,
    folder: Path,
    *,
    inputs: str,
    started: float,
    test: Mapping[str, int] | None = None,
) -> None:
    """A bundle, the recipe that it is served by, and the step's manifest, last; started: by
    ``time.monotonic``; test: what came of the promise, where nothing else keeps it."""
    bundles.save(bundle, folder)
    files.write_json(folder / RECIPE_FILE, recipe.model_dump(mode="json"))
    files.write_json(
        folder / "manifest.json",
        {
            "step": "certify",
            "inputs": inputs,
            "bundle": bundle.bundle_id,
            "seconds": round(time.monotonic() - started, 3),
            "recommendation": bundle.recommendation,
            **({"test": dict(test)} if test else {}),
        },
    )


def decide(
    settings: Certify, calibrate: ScoredRows, certified: ScoredRows
) -> tuple[Confidence, tuple[Certificate, ...], tuple[Certificate, ...] | None]:
    """How rows are scored, the certificates, the served one first, and those of each class, if any.

    Whatever is chosen is chosen on calibrate rows; of certify rows only their number is seen by it.
    """
    return _certificates(settings, _design(settings, calibrate, certified.outcomes), certified)


def _mix(parts: dict[str, ScoredRows]) -> tuple[Mixture, dict[str, ScoredRows]]:
    """What escalated rows are answered with, fitted on calibrate rows."""
    calibrate = parts["calibrate"]
    calibrator = _calibrator(calibrate)

    def opinions(part: ScoredRows) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        return calibrator.probabilities(part.logits), part.teacher

    mixture = fit_mixture(*opinions(calibrate), calibrate.rows.gold)
    mixed = {n: replace(part, mixed=mixture.of(*opinions(part))) for n, part in parts.items()}
    return mixture, mixed


def _calibrator(calibrate: ScoredRows) -> Calibrator:
    """Fitted on the teacher's answers: a probability then says how likely the two agree."""
    answers = calibrate.rows.logprobs.argmax(axis=1)
    return Calibrator(temperature=fit_temperature(calibrate.logits, answers))


def read_test_logits(bundle_dir: Path) -> npt.NDArray[np.float32]:
    """float32[n, c]: the student's logits on test rows, in corpus order."""
    try:
        with np.load(bundle_dir / SCORED_FILE) as arrays:
            return np.asarray(arrays["logits"], dtype=np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{bundle_dir / SCORED_FILE}: cannot be read ({error}); run journeyman certify again."
        ) from error


def _scored(rows: ClassRows, split: str, inputs: Inputs, scorer: StudentScorer) -> ScoredRows:
    part = rows.split(split)
    if not len(part):
        raise DataError(
            f"split {split} has no labeled rows; give it some with corpus.split_map or "
            "corpus.shares."
        )
    return ScoredRows(rows=part, logits=scorer.logits(inputs.all(part.columns)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Design:
    """What calibrate rows decide.

    scored: the calibrate rows, by a cross-fitted head if the score is learned; answers: int64[n],
    the student's on them.
    """

    confidence: Confidence
    scored: ScoredOutcomes
    answers: IntArray


def _design(settings: Certify, calibrate: ScoredRows, certify_rows: Outcomes) -> _Design:
    calibrator = _calibrator(calibrate)
    probabilities = calibrator.probabilities(calibrate.logits)
    kind, outcomes = settings.guarantee, calibrate.outcomes
    costs, counted = outcomes.to_learn_from(kind)
    candidates = {name: _candidate(name, probabilities, costs, counted) for name in settings.scores}
    name, scored = choose(kind, candidates, outcomes, certify_rows, settings.alpha, settings.delta)
    head = None
    if name == "deferral_head":
        head = fit_deferral_head(class_features(probabilities[counted]), costs[counted] > 0)
    return _Design(
        confidence=Confidence(calibrator=calibrator, score=name, head=head),
        scored=scored,
        answers=calibrate.logits.argmax(axis=1),
    )


def _candidate(
    name: ScoreName,
    probabilities: npt.NDArray[np.float64],
    costs: npt.NDArray[np.float64],
    counted: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float64]:
    """A score of calibrate rows, float64[n]; the learned one of each row without that row."""
    if name != "deferral_head":
        return score(probabilities, name)
    held_out = cross_fitted(class_features(probabilities), costs > 0, counted)
    return refined(held_out, probabilities)


def _certificates(
    settings: Certify, design: _Design, certified: ScoredRows
) -> tuple[Confidence, tuple[Certificate, ...], tuple[Certificate, ...] | None]:
    confidence, outcomes = design.confidence, certified.outcomes
    scored = ScoredOutcomes(scores=confidence.of(certified.logits)[1], outcomes=outcomes)
    alpha, delta = settings.alpha, settings.delta
    if settings.per_class:
        by_class = certify_each_class(
            settings.guarantee,
            (design.answers, design.scored),
            (certified.logits.argmax(axis=1), scored),
            certified.logits.shape[1],
            alpha,
            delta,
        )
        own = replace(confidence, class_thresholds=by_class.thresholds)
        return own, (by_class.together,), by_class.each
    certificates = tuple(
        certify_kind(kind, design.scored, scored, alpha, delta) for kind in settings.guarantees
    )
    return confidence, certificates, None


def spend_rows(
    settings: Certify, ids: Sequence[str], student: Model, out_dir: Path
) -> tuple[LedgerEntry, ...]:
    """The ledger with these uses of the certify rows, after those of the bundle that is there."""
    spent = bundles.ledger_of(out_dir)
    for kind in settings.guarantees:
        entry = LedgerEntry(
            use=f"{kind} at {settings.alpha:g}, student {student.weights_digest[:12]}",
            rows_digest=rows_digest(ids),
            delta=settings.delta,
        )
        spent = spend(spent, entry, settings.max_delta)
    return spent
