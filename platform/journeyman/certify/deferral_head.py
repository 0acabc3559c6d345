"""A small learned deferral head: a logistic regression from features of an answer to "may answer".

Fitted on `calibrate` rows; its forecasts there are cross-fitted, so that it competes with the fixed
scores on rows that it has not seen. It is written into the bundle, and serving computes it again.
Features are of class probabilities here, and of generated tokens in `sequence_scores`.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.optimize import minimize
from scipy.special import expit

from journeyman.certify.scores import shannon_entropy
from journeyman.errors import DataError
from journeyman.probabilities import FloatArray, class_probabilities

_LEAST_PROBABILITY = 1e-12
_FOLDS = 5


class DeferralHead(BaseModel):
    """What was learned, over f features.

    Attributes:
        mean, scale: of each feature over the rows it was fitted on; 0 and 1 for indicators.
        weights: of the features less their mean, by their scale.
        intercept: log-odds that a row may be answered whose features are all at their mean.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: tuple[float, ...] = Field(min_length=1)
    scale: tuple[float, ...] = Field(min_length=1)
    weights: tuple[float, ...] = Field(min_length=1)
    intercept: float

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not len(self.mean) == len(self.scale) == len(self.weights):
            raise ValueError("`mean`, `scale` and `weights` must have a value for each feature")
        if min(self.scale) <= 0:
            raise ValueError("`scale` must be positive")
        return self

    def may_answer(self, features: FloatArray) -> FloatArray:
        """The probability that the student's answer costs nothing, float64[n], of features[n, f].

        Depends on each row alone, to the last bit.
        """
        if features.shape[1] != len(self.weights):
            raise DataError(
                f"The deferral head was fitted on {len(self.weights)} features and got "
                f"{features.shape[1]}. Serve the student that the bundle was made for."
            )
        standard = (features - np.array(self.mean)) / np.array(self.scale)
        # A sum over each row, not a matrix product, whose rounding depends on the number of rows.
        return np.asarray(expit((standard * np.array(self.weights)).sum(axis=1) + self.intercept))


def class_features(probabilities: npt.ArrayLike) -> FloatArray:
    """Of class probabilities[n, c]: float64[n, 3 + c].

    Log-odds of the most probable class, the logarithm of its lead over the next one, the entropy,
    and an indicator of which class it is: some answers deserve less trust than they claim.
    """
    checked = class_probabilities(probabilities)
    top_two = np.partition(checked, -2, axis=1)[:, -2:]
    best = np.ascontiguousarray(top_two[:, 1])
    rest = np.maximum(1 - best, _LEAST_PROBABILITY)
    lead = np.maximum(best - top_two[:, 0], _LEAST_PROBABILITY)
    features = np.zeros((len(checked), 3 + checked.shape[1]))
    features[:, 0] = np.log(np.maximum(best, _LEAST_PROBABILITY) / rest)
    features[:, 1] = np.log(lead)
    features[:, 2] = shannon_entropy(checked)
    features[np.arange(len(checked)), 3 + checked.argmax(axis=1)] = 1.0
    return features


def fit_deferral_head(
    features: FloatArray, costs: npt.ArrayLike, penalty: float = 1.0
) -> DeferralHead:
    """Fit it by penalised maximum likelihood.

    Args:
        features: float64[n, f], of `calibrate` rows.
        costs: bool[n], the student must not answer the row.
        penalty: of half the squared weights, beside the sum of log-likelihoods; holds few rows
            and rare classes back.
    """
    fine = ~np.asarray(costs, dtype=np.bool_)
    if fine.shape != (len(features),) or not len(features):
        raise DataError(
            f"Costs have shape {fine.shape} for {len(features)} rows of features, expected one "
            "for each row, and at least one row. Give the `calibrate` split some rows."
        )
    mean, scale = features.mean(axis=0), features.std(axis=0)
    indicator = ((features == 0) | (features == 1)).all(axis=0)
    mean, scale = np.where(indicator, 0.0, mean), np.where(indicator | (scale == 0), 1.0, scale)
    standard = (features - mean) / scale
    signs = np.where(fine, 1.0, -1.0)

    def objective(parameters: FloatArray) -> tuple[float, FloatArray]:
        weights, intercept = parameters[:-1], parameters[-1]
        margins = signs * (standard @ weights + intercept)
        pulls = -signs * expit(-margins)
        value = np.logaddexp(0, -margins).sum() + penalty / 2 * (weights @ weights)
        return float(value), np.append(standard.T @ pulls + penalty * weights, pulls.sum())

    # Where no row or every row costs something, the intercept runs off: a bound holds it.
    bounds = [(None, None)] * features.shape[1] + [(-20.0, 20.0)]
    start = np.zeros(features.shape[1] + 1)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return DeferralHead(
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(found.x[:-1].tolist()),
        intercept=float(found.x[-1]),
    )


def cross_fitted(
    features: FloatArray, costs: npt.ArrayLike, counted: npt.NDArray[np.bool_]
) -> FloatArray:
    """`may_answer` of each row by a head that has not seen it: float64[n].

    Args:
        features: float64[n, f], of `calibrate` rows.
        costs: bool[n].
        counted: bool[n], the rows to learn from, such as those with gold; two of them at least.
    """
    of_row = np.asarray(costs, dtype=np.bool_)
    # Dealt out among the counted rows first, so that no fold leaves nothing to learn from.
    order = np.random.default_rng(0).permutation(len(features))
    order = order[np.argsort(~counted[order], kind="stable")]
    fold = np.empty(len(features), dtype=np.int64)
    fold[order] = np.arange(len(features)) % _FOLDS
    values = np.empty(len(features))
    for i in range(min(_FOLDS, len(features))):
        outside = counted & (fold != i)
        head = fit_deferral_head(features[outside], of_row[outside])
        values[fold == i] = head.may_answer(features[fold == i])
    return values
