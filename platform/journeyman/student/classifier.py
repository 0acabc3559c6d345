"""Classifiers as students: where they start. What is asked of one that has started is in
``models``.

Of a language model all stays but its output projection; the head in its place reads what the last
token of a text has come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student import architecture, models, start
from journeyman.student.models import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(
    folder: Path,
    student: Student,
    labels: Sequence[str],
    pad_id: int,
    seed: int,
    keep: start.Keep | None = None,
) -> Any:
    """The student before its first step, float32, over ``labels``; with ``lora`` a ``peft`` model
    around it, in which the head learns whole.

    pad_id: the token behind a text's end; seed: of random weights; keep: as of ``start.shaped``.
    Raises ModelError.
    """
    if student.start == "fresh":
        return _fresh(folder, student, labels, pad_id, seed)
    model = models.build(folder, labels, seed, pad_id)
    return start.shaped(model, folder, student, seed, keep)


def _fresh(
    folder: Path, student: Student, labels: Sequence[str], pad_id: int, seed: int
) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        with quiet():
            base = AutoConfig.from_pretrained(folder)
    except architecture.unreadable() as error:
        raise ModelError(
            f"{folder}: transformers cannot read its config ({architecture.first_line(error)})."
        ) from error
    config = architecture.changed(base, student, folder)
    config = models.classifying(config, labels, pad_id)
    try:
        with quiet(), torch.no_grad():
            torch.manual_seed(seed)
            made = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            # Sizes that do not go together are found as it runs.
            made.eval()(input_ids=torch.full((2, 4), 1), attention_mask=torch.ones(2, 4).long())
            return made.train()
    except architecture.unreadable(RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"{folder}: transformers cannot make a text classifier with student.config "
            f"{student.config} ({architecture.first_line(error)})."
        ) from error
