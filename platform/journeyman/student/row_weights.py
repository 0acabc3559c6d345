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
