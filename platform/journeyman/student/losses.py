"""Losses of a classifier that learns a teacher's class distribution: pure functions of tensors.

One value a row comes back, so that the caller decides over which rows to average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def soft_divergence(
    logits: torch.Tensor, teacher_logprobs: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(logits / T)), natural logarithm: float[n].

    logits, teacher_logprobs: float[n, c]; the teacher's may be -inf and need no gradient.
    The gradient is that of cross-entropy with soft labels, and T² keeps its size while T grows
    (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). The
    teacher's entropy is taken off, so that a perfect student's loss is 0.
    """
    import torch

    teacher = (teacher_logprobs / temperature).softmax(dim=-1)
    student = (logits / temperature).log_softmax(dim=-1)
    # xlogy: a class that the teacher rules out adds 0, where p * log p would be nan.
    divergence = torch.special.xlogy(teacher, teacher) - teacher * student
    return temperature**2 * divergence.sum(dim=-1)


def gold_cross_entropy(logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[gold], and 0 for a row without gold: float[n].

    logits: float[n, c]; gold: int64[n], -1 where there is none.
    """
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, gold, ignore_index=-1, reduction="none")


def distillation(
    logits: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    gold: torch.Tensor,
    *,
    temperature: float,
    gold_weight: float,
) -> torch.Tensor:
    """(1 - w) · soft_divergence + w · gold_cross_entropy: float[n].

    w is gold_weight for rows with gold; the others learn from the teacher alone.
    """
    soft = soft_divergence(logits, teacher_logprobs, temperature)
    if gold_weight == 0:
        return soft
    weight = gold_weight * (gold >= 0).to(soft.dtype)
    return (1 - weight) * soft + weight * gold_cross_entropy(logits, gold)
