"""Class probabilities: that they are such, and how far they can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from journeyman.errors import DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_MAX_CLASSES = 8_000_000  # what scores of whole rows have room for: see `certify.scores`


def class_probabilities(values: npt.ArrayLike) -> FloatArray:
    """Check class probabilities[n, c] and return them as contiguous float64, otherwise unchanged.

    Contiguous, because numpy adds up a row of a strided array in another order, and a batch must
    score exactly like its rows alone.
    """
    probabilities = np.ascontiguousarray(values, dtype=np.float64)
    if probabilities.ndim != 2 or not 2 <= probabilities.shape[1] <= _MAX_CLASSES:
        raise DataError(
            f"Class probabilities have shape {probabilities.shape}, expected [rows, classes] with "
            "at least two classes. Pass one row for each example, one column for each label."
        )
    # Written so that a NaN fails the comparison.
    valid = (probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) < 1e-3)
    if not valid.all():
        row = int(np.argmin(valid))
        raise DataError(
            f"Row {row} of {len(valid)} is not a distribution: its values sum to "
            f"{probabilities[row].sum():g}, the smallest is {probabilities[row].min():g}. "
            "Pass probabilities (Calibrator.probabilities gives them), not logits."
        )
    return probabilities


def with_targets(
    probabilities: npt.ArrayLike, targets: npt.ArrayLike
) -> tuple[FloatArray, IntArray]:
    """Checked: probabilities, float64[n, c], and the right class of each row, int64[n]; n > 0."""
    checked = class_probabilities(probabilities)
    classes = np.asarray(targets)
    n_rows, n_classes = checked.shape
    if classes.shape != (n_rows,) or classes.dtype.kind not in "iu" or not n_rows:
        raise DataError(
            f"Targets have shape {classes.shape} and type {classes.dtype}, expected ({n_rows},) "
            "whole numbers, at least one. Pass the right class of each row."
        )
    if classes.min() < 0 or classes.max() >= n_classes:
        raise DataError(
            f"Targets run from {classes.min()} to {classes.max()}, but there are {n_classes} "
            "classes. Number them from 0 in the order of the label names."
        )
    return checked, classes.astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBins:
    """A reliability diagram; each array has one entry a bin.

    Attributes:
        lower: left edge, exclusive but for the first bin's 0.
        upper: right edge, inclusive.
        count: rows whose highest probability falls into the bin.
        mean_confidence: mean highest probability of those rows; NaN in an empty bin.
        accuracy: share of those rows that are right; NaN in an empty bin.
    """

    lower: FloatArray
    upper: FloatArray
    count: IntArray
    mean_confidence: FloatArray
    accuracy: FloatArray


def reliability_bins(
    probabilities: npt.ArrayLike, targets: npt.ArrayLike, n_bins: int = 15
) -> ReliabilityBins:
    """Bin rows by their highest probability into `n_bins` of equal width (Guo et al. 2017).

    Args:
        probabilities: float[n, c].
        targets: int[n], the right class of each row.
        n_bins: bins between 0 and 1.
    """
    checked, classes = with_targets(probabilities, targets)
    confidence = checked.max(axis=1)
    right = checked.argmax(axis=1) == classes
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    # side="left" puts a value on an edge into the bin that ends there, so 1.0 is in the last one.
    bin_of_row = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, n_bins - 1)
    count = np.bincount(bin_of_row, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_of_row, confidence, n_bins) / count
        bin_accuracy = np.bincount(bin_of_row, right, n_bins) / count
    return ReliabilityBins(
        lower=edges[:-1],
        upper=edges[1:],
        count=count,
        mean_confidence=mean_confidence,
        accuracy=bin_accuracy,
    )


def expected_calibration_error(
    probabilities: npt.ArrayLike, targets: npt.ArrayLike, n_bins: int = 15
) -> float:
    """How far the highest probability is from how often it is right, 0 (best) to 1.

    sum over bins b of |rows in b| / n * |accuracy of b - mean confidence of b| (equation 3 of Guo
    et al. 2017, On Calibration of Modern Neural Networks), over bins of equal width.
    """
    bins = reliability_bins(probabilities, targets, n_bins)
    filled = bins.count > 0
    gaps = np.abs(bins.mean_confidence - bins.accuracy)[filled]
    return float(np.average(gaps, weights=bins.count[filled]))


def balanced_accuracy(answers: IntArray, targets: IntArray) -> float:
    """Mean over the classes among the targets of the share that is answered right.

    answers, targets: int[n], n at least 1.
    """
    right = answers == targets
    return float(np.mean([right[targets == c].mean() for c in np.unique(targets)]))


def area_under_roc(scores: FloatArray, positive: npt.NDArray[np.bool_]) -> float | None:
    """P(a positive row scores above another one), ties half (Mann and Whitney); None of one kind.

    scores: float64[n]; positive: bool[n].
    """
    from scipy.stats import rankdata

    n_positive = int(positive.sum())
    n_others = len(positive) - n_positive
    if not n_positive or not n_others:
        return None
    ranks = float(rankdata(scores)[positive].sum())
    return (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_others)
