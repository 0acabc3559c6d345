"""Where a student of either kind starts: which layers of a model stay, low-rank matrices in it, and
both again as a checkpoint has them.

Knows no task: ``causal`` and ``classifier`` bring the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.recipe import Student
from journeyman.student import lora, pruning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Callable[["PreTrainedModel"], Sequence[int]]
"""Numbers of the layers that stay of a model that is pruned."""


def shaped(
    model: PreTrainedModel, folder: Path, student: Student, seed: int, keep: Keep | None
) -> Any:
    """A model that has learned, with the layers and the low-rank matrices that ``student`` asks
    for; with ``lora`` a ``peft`` model around it.

    folder: where it is from; keep: default ``pruning.chosen`` without texts. Raises ModelError.
    """
    import torch

    if student.start == "pruned":
        kept = keep(model) if keep else pruning.chosen(model, folder, student)
        model = pruning.of_layers(model, kept, folder)
    if student.lora:
        torch.manual_seed(seed)
        model = lora.adapted(model, student, folder)
    return model


def begun(
    build: Callable[[Keep], Any],
    model_dir: Path,
    student: Student,
    checkpoint: Path | None,
    sample_texts: Callable[[], Sequence[str]],
) -> tuple[Any, list[int]]:
    """What ``build`` makes of model_dir, with the low-rank matrices of a checkpoint where there is
    one; and the numbers of the layers that stayed, none where it was not pruned.

    sample_texts: what layers are measured on, where they are. Raises ModelError.
    """
    kept: list[int] = []

    def keep(model: PreTrainedModel) -> list[int]:
        before = lora.layers(checkpoint) if checkpoint else None
        if before is None:
            texts = sample_texts() if student.layer_choice == "similarity" else ()
            before = pruning.chosen(model, model_dir, student, texts)
        kept[:] = before
        return kept

    model = build(keep)
    if checkpoint:
        lora.restore(model, checkpoint)
    return model, kept
