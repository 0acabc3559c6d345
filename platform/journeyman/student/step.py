"""The train step: which student learns which labels, and what a worker is to load for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from journeyman.errors import RecipeError
from journeyman.labels import dataset
from journeyman.models import Model
from journeyman.recipe import Generate, Logits, Recipe
from journeyman.student import trackers

if TYPE_CHECKING:
    from journeyman.student.lesson import Load
    from journeyman.student.live import TrainProgress
    from journeyman.student.loop import TrainResult


def check(recipe: Recipe) -> None:
    """Raises RecipeError where the student cannot learn labels of the recipe's kind, or its
    training is to be watched by what is not installed."""
    trackers.check(recipe.training.trackers)
    student, kind = recipe.learner(), recipe.labels.kind
    if student.kind == "classifier" and kind != "classes":
        raise RecipeError(
            f"student.kind: classifier learns class distributions, and labels.kind is {kind}; set "
            "student.kind: causal, or labels.kind: classes."
        )
    if student.kind == "causal" and kind == "classes":
        raise RecipeError(
            "student.kind: causal learns tokens, and labels.kind is classes; set student.kind: "
            "classifier, or labels.kind to logits, generate or rationales."
        )


def train(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: Path,
    parent: Model,
    teacher: Model,
    out_dir: Path,
    *,
    inputs: str,
    labels_digest: str,
    on_progress: Callable[[TrainProgress], None],
) -> TrainResult:
    """Train the recipe's student on a finished label dataset and export it to out_dir.

    labels: where it is, for every node; parent: what student.model names. Ray is up.
    Raises RecipeError, DataError, ModelError or ClusterError.
    """
    from journeyman.student import loop

    check(recipe)
    if recipe.learner().kind == "classifier":
        load = _classifying(recipe, labels, corpus_dir, parent)
    else:
        cache = loop.work_folder(out_dir, inputs) / "rows"
        load = _causal(recipe, labels, corpus_dir, parent, teacher, cache)
    return loop.train(
        recipe,
        load,
        parent,
        out_dir,
        inputs=inputs,
        labels_digest=labels_digest,
        on_progress=on_progress,
    )


def _classifying(recipe: Recipe, labels: str | Path, corpus_dir: Path, parent: Model) -> Load:
    from journeyman.student.classifying import Classifying

    return partial(
        Classifying,
        model_dir=parent.path,
        student=recipe.learner(),
        training=recipe.training,
        read_rows=partial(dataset.read_classes, labels, corpus_dir, ("train", "calibrate")),
    )


def _causal(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: Path,
    parent: Model,
    teacher: Model,
    rows_dir: Path,
) -> Load:
    """Rows are written here, once, for all workers."""
    from journeyman.student import token_rows
    from journeyman.student.causal_learner import Causal

    write_rows(recipe, labels, corpus_dir, parent, teacher, rows_dir, token_rows.SPLITS)
    return partial(
        Causal,
        model_dir=parent.path,
        student=recipe.learner(),
        training=recipe.training,
        rows_dir=rows_dir,
    )


def write_rows(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: Path,
    parent: Model,
    teacher: Model,
    rows_dir: Path,
    splits: Sequence[str],
) -> None:
    """Write the rows that a language model learns to rows_dir/SPLIT, unless all are there.

    Raises RecipeError where the labels are distributions over another vocabulary.
    """
    from journeyman.student import token_rows, vocabulary
    from journeyman.student.models import load_tokenizer

    other = "the teacher is behind a URL, which gives no tokens"
    if not recipe.teacher.url:
        other = vocabulary.other_vocabulary(parent.path, teacher.path)
    if other and isinstance(recipe.labels, Logits):
        raise RecipeError(
            f"student.model: {recipe.learner().model} has another vocabulary than the teacher "
            f"({other}), so that it cannot learn the teacher's distributions; take a student of "
            "the teacher's family, or labels.kind: generate, which is learned as text then."
        )
    if all((rows_dir / split).exists() for split in splits):
        return
    as_text = bool(other) or not isinstance(recipe.labels, Logits | Generate)
    token_rows.build(
        labels,
        corpus_dir,
        recipe.labels,
        load_tokenizer(parent.path if as_text else teacher.path),
        recipe.learner().max_length,
        rows_dir,
        as_text=as_text,
        row_weight=recipe.training.row_weight,
        splits=splits,
    )
