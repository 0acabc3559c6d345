"""What ``calibrate`` rows decide of a student: its temperature, its score, the mixture of its
opinion with the teacher's; and what ``certify`` rows, which decide nothing, certify of that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from journeyman.certify.calibration import Calibrator, fit_temperature
from journeyman.certify.certificate import Certificate
from journeyman.certify.confidence import Confidence
from journeyman.certify.deferral_head import class_features, cross_fitted, fit_deferral_head
from journeyman.certify.guarantees import Outcomes, ScoredOutcomes, certify_kind, choose
from journeyman.certify.mixture import Mixture, fit_mixture
from journeyman.certify.per_class import certify_each_class
from journeyman.certify.scores import ScoreName, refined, score
from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.probabilities import IntArray
from journeyman.recipe import Certify


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


def rows_of(rows: ClassRows, split: str) -> ClassRows:
    """Raises DataError where there are none."""
    part = rows.split(split)
    if not len(part):
        raise DataError(
            f"split {split} has no labeled rows; give it some with corpus.split_map or "
            "corpus.shares."
        )
    return part


def decide(
    settings: Certify, calibrate: ScoredRows, certified: ScoredRows
) -> tuple[Confidence, tuple[Certificate, ...], tuple[Certificate, ...] | None]:
    """How rows are scored, the certificates, the served one first, and those of each class, if any.

    Whatever is chosen is chosen on calibrate rows; of certify rows only their number is seen by it.
    """
    return _certificates(settings, design(settings, calibrate, certified.outcomes), certified)


def mix(parts: dict[str, ScoredRows]) -> tuple[Mixture, dict[str, ScoredRows]]:
    """What escalated rows are answered with, fitted on those of the part ``calibrate``; raises
    DataError where none of them has gold."""
    calibrate = parts["calibrate"]
    calibrator = fit_calibrator(calibrate)

    def opinions(part: ScoredRows) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        return calibrator.probabilities(part.logits), part.teacher

    mixture = fit_mixture(*opinions(calibrate), calibrate.rows.gold)
    mixed = {n: replace(part, mixed=mixture.of(*opinions(part))) for n, part in parts.items()}
    return mixture, mixed


def fit_calibrator(calibrate: ScoredRows) -> Calibrator:
    """Fitted on the teacher's answers: a probability then says how likely the two agree."""
    answers = calibrate.rows.logprobs.argmax(axis=1)
    return Calibrator(temperature=fit_temperature(calibrate.logits, answers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What calibrate rows decide.

    scored: the calibrate rows, by a cross-fitted head if the score is learned; answers: int64[n],
    the student's on them.
    """

    confidence: Confidence
    scored: ScoredOutcomes
    answers: IntArray


def design(settings: Certify, calibrate: ScoredRows, certify_rows: Outcomes) -> Design:
    calibrator = fit_calibrator(calibrate)
    probabilities = calibrator.probabilities(calibrate.logits)
    kind, outcomes = settings.guarantee, calibrate.outcomes
    costs, counted = outcomes.to_learn_from(kind)
    candidates = {
        name: held_out_scores(name, probabilities, costs, counted) for name in settings.scores
    }
    name, scored = choose(kind, candidates, outcomes, certify_rows, settings.alpha, settings.delta)
    return Design(
        confidence=fit_confidence(name, calibrator, probabilities, costs, counted),
        scored=scored,
        answers=calibrate.logits.argmax(axis=1),
    )


def fit_confidence(
    name: ScoreName,
    calibrator: Calibrator,
    probabilities: npt.NDArray[np.float64],
    costs: npt.NDArray[np.float64],
    counted: npt.NDArray[np.bool_],
) -> Confidence:
    """A score, fitted on calibrate rows where it is learned; arrays as of ``held_out_scores``."""
    head = None
    if name == "deferral_head":
        head = fit_deferral_head(class_features(probabilities[counted]), costs[counted] > 0)
    return Confidence(calibrator=calibrator, score=name, head=head)


def held_out_scores(
    name: ScoreName,
    probabilities: npt.NDArray[np.float64],
    costs: npt.NDArray[np.float64],
    counted: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float64]:
    """A score of calibrate rows, float64[n]; the learned one of each row without that row.

    probabilities: float64[n, c], calibrated; costs, counted: by ``Outcomes.to_learn_from``.
    """
    if name != "deferral_head":
        return score(probabilities, name)
    held_out = cross_fitted(class_features(probabilities), costs > 0, counted)
    return refined(held_out, probabilities)


def _certificates(
    settings: Certify, design: Design, certified: ScoredRows
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
