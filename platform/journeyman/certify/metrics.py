"""How good a student is: accuracy, agreement, likelihood, divergence from its teacher.

Point estimates for tables and plots. No promise rests on them: those are in `certificate`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from journeyman.errors import DataError
from journeyman.probabilities import class_probabilities, with_targets

# A probability of zero counts as this much, so that one impossible row leaves a mean finite.
_LEAST_PROBABILITY = float(np.finfo(np.float64).tiny)


def accuracy(predicted: npt.ArrayLike, gold: npt.ArrayLike) -> float:
    """Share of rows where predicted[n] equals gold[n]."""
    return _share_equal(predicted, gold)


def agreement(student: npt.ArrayLike, teacher: npt.ArrayLike) -> float:
    """Share of rows where student[n] and teacher[n] give the same answer."""
    return _share_equal(student, teacher)


def brier(probabilities: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Mean squared distance to the one-hot target, summed over classes: 0 (best) to 2."""
    checked, classes = with_targets(probabilities, targets)
    one_hot = np.eye(checked.shape[1])[classes]
    return float(((checked - one_hot) ** 2).sum(axis=1).mean())


def negative_log_likelihood(probabilities: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Mean -log probability of the target class, in nats."""
    checked, classes = with_targets(probabilities, targets)
    of_target = checked[np.arange(len(classes)), classes]
    return float(-np.log(np.maximum(of_target, _LEAST_PROBABILITY)).mean())


def kl_divergence(teacher: npt.ArrayLike, student: npt.ArrayLike) -> float:
    """Mean KL(teacher || student) in nats, over teacher[n, c] and student[n, c]."""
    p, q = class_probabilities(teacher), class_probabilities(student)
    if p.shape != q.shape or not len(p):
        raise DataError(
            f"Teacher probabilities have shape {p.shape}, the student's {q.shape}. "
            "Pass the same rows and classes of both, at least one row."
        )
    log_ratio = np.log(np.maximum(p, _LEAST_PROBABILITY)) - np.log(
        np.maximum(q, _LEAST_PROBABILITY)
    )
    return float((p * log_ratio).sum(axis=1).mean())


def area_under_risk_coverage(scores: npt.ArrayLike, losses: npt.ArrayLike) -> float:
    """Mean, over every coverage k/n, of the mean loss of the k most confident rows.

    Args:
        scores: float[n], higher is more confident. Tied rows count as in random order: each
            stands for the mean loss of its tie, which is the expectation over all orders.
        losses: float[n] or bool[n], such as "differs from the teacher".
    """
    score_of_row = np.asarray(scores, dtype=np.float64)
    loss_of_row = np.asarray(losses, dtype=np.float64)
    if score_of_row.shape != loss_of_row.shape or score_of_row.ndim != 1 or not len(loss_of_row):
        raise DataError(
            f"Scores have shape {score_of_row.shape}, losses {loss_of_row.shape}. "
            "Pass one of each for every row, at least one row."
        )
    _, tie_of_row, rows_in_tie = np.unique(-score_of_row, return_inverse=True, return_counts=True)
    loss_of_tie = np.bincount(tie_of_row, loss_of_row) / rows_in_tie
    ordered = np.repeat(loss_of_tie, rows_in_tie)
    return float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1)).mean())


def _share_equal(left: npt.ArrayLike, right: npt.ArrayLike) -> float:
    one, other = np.asarray(left), np.asarray(right)
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise DataError(
            f"Answers have shapes {one.shape} and {other.shape}. "
            "Pass one answer of each kind for every row, at least one row."
        )
    return float((one == other).mean())
