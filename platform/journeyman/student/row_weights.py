"""What each train row weighs in the loss. Knows numbers, not what they are taken from."""

from __future__ import annotations

import numpy as np

from journeyman.errors import DataError


def normalised(raw: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """float64[n]: raw · a constant, such that the mean over the split is 1.

    raw: float[n], 0 or more; sizes: int64[n], what each row counts in the loss's mean (its learned
    tokens, or 1). So weights neither raise nor lower the loss, and a batch of sure rows counts more
    than one of unsure ones: the mean of a batch is over its sizes, not over its weights.
    Raises DataError where no row has a weight.
    """
    raw = np.asarray(raw, np.float64)
    total = (raw * sizes).sum()
    if not np.isfinite(total) or total <= 0:
        raise DataError(
            f"the weights of the train rows add up to {total}; set training.row_weight: none, or "
            "look at the labels with journeyman labels stats."
        )
    return raw * (sizes.sum() / total)


def of_tasks(
    raw: np.ndarray, n_tokens: np.ndarray, reasoning: np.ndarray, reasoning_weight: float
) -> np.ndarray:
    """float64[n]: what each token of a row counts in Distilling step-by-step, whose loss is the
    mean over the answers' tokens plus reasoning_weight times that over the reasonings' (Hsieh et
    al. 2023, section 3.2): the weighted sum over all tokens of the split.

    raw: float[n], of the rows, before ``normalised`` over their task; n_tokens: int64[n], learned;
    reasoning: bool[n], True for the rows of the second task.
    """
    weights = np.empty(len(raw))
    for task, share in ((~reasoning, 1.0), (reasoning, reasoning_weight)):
        if task.any():
            own = normalised(raw[task], n_tokens[task])
            weights[task] = own * share / n_tokens[task].sum()
    return weights
