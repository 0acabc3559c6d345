"""Losses of a classifier that learns a teacher's class distribution: pure functions of tensors.

One value a row comes back, so that the caller decides over which rows to average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def soft_divergence(
    logits: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    temperature: float,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(logits / T)), natural logarithm: float[n].

    logits, teacher_logprobs: float[n, c]; the teacher's may be -inf and need no gradient.
    The gradient is that of cross-entropy with soft labels, and T² keeps its size while T grows
    (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). Its smallest
    value, the teacher's entropy, is taken off, so that a perfect student's loss is 0.
    class_weights: float[c], of each class's term in that cross-entropy, as in
    ``torch.nn.functional.cross_entropy``: what the student learns is then weight · probability,
    normalised, and a row counts by their sum. label_smoothing: share of the target that is spread
    evenly over the classes, before they are weighed.
    """
    import torch

    target = (teacher_logprobs / temperature).softmax(dim=-1)
    student = (logits / temperature).log_softmax(dim=-1)
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / target.shape[-1]
    if class_weights is not None:
        target = target * class_weights
    mass = target.sum(dim=-1, keepdim=True)
    share = target / mass
    # xlogy: a class that the teacher rules out adds 0, where p * log p would be nan.
    divergence = mass * (torch.special.xlogy(share, share) - share * student)
    return temperature**2 * divergence.sum(dim=-1)


def balanced(counts: np.ndarray) -> np.ndarray:
    """Weights that give all classes the same part in the loss: float64[c].

    n / (c · count), as scikit-learn's ``compute_class_weight``; counts: float[c], the sum of each
    class's probabilities over the n rows; inf for a class that has none.
    """
    with np.errstate(divide="ignore"):
        return counts.sum(dtype=np.float64) / (len(counts) * np.asarray(counts, np.float64))


def certain(classes: np.ndarray, n_classes: int) -> np.ndarray:
    """Distributions that are sure of a class each: float32[n, c], natural logs; classes: int[n]."""
    sure = np.full((len(classes), n_classes), -np.inf, np.float32)
    sure[np.arange(len(classes)), classes] = 0.0
    return sure


def gold_cross_entropy(
    logits: torch.Tensor,
    gold: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-weight · log softmax(logits)[gold], and 0 for a row without gold: float[n].

    logits: float[n, c]; gold: int64[n], -1 where there is none; class_weights: float[c];
    label_smoothing: as in ``soft_divergence``.
    """
    from torch.nn.functional import cross_entropy

    return cross_entropy(
        logits,
        gold,
        weight=class_weights,
        ignore_index=-1,
        reduction="none",
        label_smoothing=label_smoothing,
    )


def distillation(
    logits: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    gold: torch.Tensor,
    *,
    temperature: float,
    gold_weight: float,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """(1 - w) · soft_divergence + w · gold_cross_entropy: float[n].

    w is gold_weight for rows with gold; the others learn from the teacher alone.
    """
    soft = soft_divergence(logits, teacher_logprobs, temperature, class_weights, label_smoothing)
    if gold_weight == 0:
        return soft
    weight = gold_weight * (gold >= 0).to(soft.dtype)
    hard = gold_cross_entropy(logits, gold, class_weights, label_smoothing)
    return (1 - weight) * soft + weight * hard
