"""Every guarantee by its name: what each forecasts from `calibrate` rows, and certifies.

Whatever a guarantee takes from `calibrate` rows (a start, a sequence of thresholds) is fixed here
before `certify` rows are looked at. The rules themselves and their proofs are next door.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from journeyman.certify.accuracy import certify_accuracy, design_against_gold
from journeyman.certify.certificate import Certificate, GuaranteeKind, certify_system_agreement
from journeyman.certify.design import Name, choose_score, forecast_coverage
from journeyman.certify.selective import certify_selective_agreement, design_selective
from journeyman.errors import DataError
from journeyman.probabilities import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcomes:
    """What became of n rows, had the student answered them all.

    Attributes:
        differs: bool[n], the student's answer is not the teacher's.
        losses: int64[n], 1 where only the teacher is right, -1 where only the student is, else 0.
        has_gold: bool[n]; where it is false, `losses` means nothing.
    """

    differs: npt.NDArray[np.bool_]
    losses: IntArray
    has_gold: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.differs)

    def costs(self, kind: GuaranteeKind) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """What each row costs under a guarantee, float64[n], and which rows count, bool[n]."""
        if kind != "accuracy":
            return self.differs.astype(np.float64), np.ones(len(self), dtype=np.bool_)
        return self.losses.astype(np.float64), self.has_gold

    def to_learn_from(self, kind: GuaranteeKind) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """The same of calibrate rows; raises DataError where gold is needed and none has it."""
        costs, counted = self.costs(kind)
        if not counted.any():
            raise DataError(
                "certify.guarantee accuracy needs gold labels on calibrate rows, and none has one; "
                "give that split some, or certify agreement."
            )
        return costs, counted

    def take(self, rows: npt.NDArray[np.bool_]) -> Outcomes:
        """Those of rows[n]."""
        return Outcomes(
            differs=self.differs[rows], losses=self.losses[rows], has_gold=self.has_gold[rows]
        )

    def against_gold(self, scores: FloatArray) -> tuple[FloatArray, IntArray]:
        """Scores and losses of the rows with gold."""
        if not self.has_gold.any():
            raise DataError(
                "certify.guarantee accuracy needs gold labels, and none of these rows has one: "
                "give calibrate and certify rows some, or certify agreement."
            )
        return scores[self.has_gold], self.losses[self.has_gold]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredOutcomes:
    """Rows with their confidence, float64[n], and their outcomes."""

    scores: FloatArray
    outcomes: Outcomes

    def take(self, rows: npt.NDArray[np.bool_]) -> ScoredOutcomes:
        """Those of rows[n]."""
        return ScoredOutcomes(scores=self.scores[rows], outcomes=self.outcomes.take(rows))


def forecast(
    kind: GuaranteeKind,
    calibrate: ScoredOutcomes,
    certify_rows: Outcomes,
    alpha: float,
    delta: float,
) -> float:
    """The share that would be certified to be answered; of `certify_rows` only their number and
    how many have gold is used."""
    scores, outcomes = calibrate.scores, calibrate.outcomes
    if kind == "accuracy":
        n_gold = int(certify_rows.has_gold.sum())
        rows = outcomes.against_gold(scores)
        return design_against_gold(*rows, n_gold, alpha, delta).coverage
    if kind == "selective_agreement":
        n = len(certify_rows)
        return design_selective(scores, outcomes.differs, n, alpha, delta).coverage
    return forecast_coverage(scores, outcomes.differs, alpha, delta, len(certify_rows))


def choose(
    kind: GuaranteeKind,
    candidates: Mapping[Name, FloatArray],
    calibrate: Outcomes,
    certify_rows: Outcomes,
    alpha: float,
    delta: float,
) -> tuple[Name, ScoredOutcomes]:
    """The score with which most would be certified to be answered, and calibrate rows by it.

    candidates: float64[n] each, of calibrate rows. Of certify rows only their number is seen, and
    how many have gold.
    """
    costs, counted = calibrate.costs(kind)

    def forecast_of(scores: FloatArray) -> float:
        scored = ScoredOutcomes(scores=scores, outcomes=calibrate)
        return forecast(kind, scored, certify_rows, alpha, delta)

    name = choose_score(candidates, costs * counted, forecast_of).name
    return name, ScoredOutcomes(scores=candidates[name], outcomes=calibrate)


def certify_kind(
    kind: GuaranteeKind,
    calibrate: ScoredOutcomes,
    certify: ScoredOutcomes,
    alpha: float,
    delta: float,
) -> Certificate:
    """The certificate of a kind; raises DataError where gold is needed and missing."""
    scores, outcomes = certify.scores, certify.outcomes
    if kind == "system_agreement":
        return certify_system_agreement(scores, outcomes.differs, alpha, delta)
    if kind == "accuracy":
        rows = outcomes.against_gold(scores)
        of_calibrate = calibrate.outcomes.against_gold(calibrate.scores)
        design = design_against_gold(*of_calibrate, len(rows[0]), alpha, delta)
        return certify_accuracy(*rows, alpha, delta, design)
    known = calibrate.scores, calibrate.outcomes.differs
    # A class without calibrate rows of its own is certified by the walk alone.
    by_design = design_selective(*known, len(scores), alpha, delta) if len(known[0]) else None
    return certify_selective_agreement(scores, outcomes.differs, alpha, delta, by_design)
