"""How sure a teacher was of a row: one number from what a label dataset has of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from journeyman.errors import DataError
from journeyman.labels.codec import Codec
from journeyman.recipe import RowWeight


def of_classes(logprobs: np.ndarray) -> np.ndarray:
    """float64[n]: the largest probability of each row; logprobs: float[n, c], normalised."""
    return np.exp(np.max(logprobs, axis=1).astype(np.float64))


def of_record(row: dict[str, Any], weight: RowWeight, codec: Codec | None) -> float:
    """What a record of token labels weighs, above 0 and at most 1 (``training.row_weight``).

    agreement: the share of the samples. confidence: of logits, the mean over positions of the
    largest probability; of an answer, the geometric mean of its tokens' probabilities; of a
    reasoning with classes, the largest class probability. codec: of logits. Raises DataError.
    """
    if weight == "none":
        return 1.0
    if weight == "agreement":
        return float(row["agreement"])
    if row.get("class_logprobs") is not None:
        return float(of_classes(np.array([row["class_logprobs"]]))[0])
    if row.get("output_logprob") is not None:
        return float(np.exp(row["output_logprob"] / max(1, row["n_tokens"])))
    if codec is None or row.get("logprobs") is None or "output" in row:
        raise DataError(
            f"row {row['id']} has no probabilities of its teacher, which training.row_weight: "
            "confidence takes; set training.row_weight: none, or label with a teacher that gives "
            "them."
        )
    decoded = codec.decode(row["logprobs"], row["n_positions"])
    return float(of_classes(decoded.logprobs).mean()) if row["n_positions"] else 1.0
