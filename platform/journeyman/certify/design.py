"""Picking among designs on `calibrate` rows, before `certify` rows are looked at.

Owns the forecast of certified coverage and the choice of the confidence score by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from journeyman.certify.certificate import allowed_errors
from journeyman.certify.metrics import area_under_risk_coverage
from journeyman.certify.thresholds import threshold_table
from journeyman.errors import DataError, RecipeError
from journeyman.probabilities import FloatArray

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreChoice(Generic[Name]):
    """The confidence score picked, and what was forecast for each candidate.

    Attributes:
        name: the score with the highest forecast.
        coverage: that forecast, the share of rows it would be certified to answer.
        coverages: the forecasts of all candidates.
    """

    name: Name
    coverage: float
    coverages: Mapping[Name, float]


def forecast_coverage(
    scores: npt.ArrayLike, differs: npt.ArrayLike, alpha: float, delta: float, n_certify: int
) -> float:
    """The coverage that n_certify rows would be certified to, by system agreement, if like these.

    The counts of these rows are scaled to n_certify before the rule is applied, so that 200
    `calibrate` rows can speak for 500 `certify` rows.

    Args:
        scores: float[n], of the `calibrate` rows.
        differs: bool[n], of the `calibrate` rows.
        alpha: target.
        delta: allowed chance of a broken promise.
        n_certify: rows that the certificate will have.
    """
    table = threshold_table(scores, differs)
    if not table.n:
        raise DataError("There are no calibrate rows to forecast from. Give that split some.")
    scaled_errors = np.ceil(table.n_errors * (n_certify / table.n))
    accepted = table.n_accepted[scaled_errors <= allowed_errors(n_certify, alpha, delta)]
    return float(accepted[-1] / table.n) if len(accepted) else 0.0


def choose_score(
    scores: Mapping[Name, FloatArray],
    costs: npt.ArrayLike,
    forecast: Callable[[FloatArray], float],
) -> ScoreChoice[Name]:
    """Pick the score with the highest forecast of certified coverage at the target.

    Not by area under the risk-coverage curve (the deferral curve), which weighs thresholds that
    nobody will use; the area only decides between equal forecasts, such as 0 and 0.

    Args:
        scores: candidates, float[n] each, of `calibrate` rows; a learned one cross-fitted.
        costs: float[n], what each row costs if the student answers it: 1 where it differs.
        forecast: the coverage that a candidate's float[n] would be certified to.
    """
    if not scores:
        raise RecipeError("No confidence score to pick from: name some in certify.scores.")
    coverages = {name: forecast(values) for name, values in scores.items()}
    best = max(
        scores,
        key=lambda name: (coverages[name], -area_under_risk_coverage(scores[name], costs)),
    )
    return ScoreChoice(name=best, coverage=coverages[best], coverages=coverages)
