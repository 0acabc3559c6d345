"""The train step: which student learns which labels, and what a worker is to load for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import models
from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.mirror import Mirror
from journeyman.models import Model
from journeyman.recipe import Generate, Logits, Recipe, Training, digest, unread
from journeyman.student import trackers
from journeyman.student.live import ReadProgress
from journeyman.student.subset import Subset

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from journeyman.student.class_rows import HeldOutRows, TrainRows
    from journeyman.student.learner import Learner
    from journeyman.student.lesson import Load
    from journeyman.student.live import TrainProgress
    from journeyman.student.loop import TrainResult

_log = logging.getLogger(__name__)


def check(recipe: Recipe) -> None:
    """Raises RecipeError where the student cannot learn labels of the recipe's kind, or its
    training is to be watched by what is not installed; ModelError where LoRA's package is not."""
    from journeyman.student import lora

    trackers.check(recipe.training.trackers)
    if recipe.learner().lora:  # for the end, on this machine; workers ask on theirs
        lora.check()
    if recipe.run_url and "mlflow" in recipe.training.trackers:
        trackers.check_server()
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


def _other_tokens(recipe: Recipe, parent: Model, teacher: Model) -> str:
    """Why the student's tokens are not the teacher's; empty where they are, or need not be."""
    from journeyman.student import vocabulary

    if recipe.learner().kind != "causal" or not isinstance(recipe.labels, Logits | Generate):
        return ""
    if recipe.teacher.gives_text_alone:
        return "the teacher is behind a URL or in a column, which gives no tokens"
    return vocabulary.other_vocabulary(parent.path, teacher.path)


def check_vocabulary(recipe: Recipe, parent: Model, teacher: Model) -> None:
    """Raises RecipeError where the recipe asks for what is only possible with a student whose
    tokens are the teacher's, and they are not; or for chats with one that has no template."""
    training, model = recipe.training, recipe.learner().model
    other = _other_tokens(recipe, parent, teacher)
    if training.on_policy:
        _check_same_prompts(recipe, parent, teacher, other)
    _check_chat(recipe, parent, other)
    if not other or training.divergence == "uld":
        return
    if isinstance(recipe.labels, Logits):
        raise RecipeError(
            f"student.model: {model} has another vocabulary than the teacher ({other}), so that it "
            "cannot learn the teacher's distributions token by token; take a student of the "
            "teacher's family, training.divergence: uld, which compares sorted probabilities, or "
            "labels.kind: generate, which is learned as text then."
        )
    if training.divergence != "forward_kl":
        raise RecipeError(
            f"training.divergence: {training.divergence} compares distributions token by token, "
            f"and student.model: {model} has another vocabulary than the teacher ({other}); leave "
            "it out to learn the teacher's answers as text, or take uld, which compares sorted "
            "probabilities."
        )
    if by_text := set(unread.names(recipe, as_text=True)) - set(unread.names(recipe)):
        raise RecipeError(
            f"student.model: {model} has another vocabulary than the teacher ({other}), so that it "
            "learns the answers as text, by cross-entropy alone, and "
            f"training.{min(by_text)} would change nothing; {unread.LEAVE_OUT}."
        )


def _check_chat(recipe: Recipe, parent: Model, other: str) -> None:
    """In its own tokens the student reads its prompts by its own template."""
    from journeyman.student.models import load_tokenizer

    asks = recipe.learner().kind == "causal" and getattr(recipe.labels, "chat", False)
    if not asks or not _in_own_tokens(recipe, other):
        return
    if load_tokenizer(parent.path).chat_template is None:
        raise RecipeError(
            f"student.model: {recipe.learner().model} has no chat template, and with labels.chat "
            "it reads its prompts by its own; take one that has (an instruct model, as a rule), or "
            "set labels.chat: false and write the turns into labels.prompt."
        )


def _in_own_tokens(recipe: Recipe, other: str) -> bool:
    """Whether the student learns in its own tokens. other: as of ``_other_tokens``."""
    if not isinstance(recipe.labels, Logits | Generate):
        return True
    return bool(other) or recipe.training.divergence == "uld"


def _check_same_prompts(recipe: Recipe, parent: Model, teacher: Model, other: str) -> None:
    """On-policy rounds: what the student reads and writes is what the teacher scores."""
    from journeyman.student import vocabulary

    model, chat = recipe.learner().model, getattr(recipe.labels, "chat", False)
    why = other or vocabulary.other_prompt(parent.path, teacher.path, chat=chat)
    if why:
        raise RecipeError(
            f"training.on_policy: the teacher scores the student's own tokens, and student.model: "
            f"{model} has others ({why}); take a student of the teacher's family, or leave "
            "on_policy out."
        )


def inputs_digest(
    recipe: Recipe, training: Training, labels: Mapping[str, Any], parent: Model
) -> str:
    """Of all that decides the student; training: in place of the recipe's; labels: the dataset's
    manifest; parent: what student.model names."""
    return digest(
        [
            labels["digest"],
            labels["filtered"]["inputs"],
            parent.identity,
            recipe.learner().model_dump(mode="json"),
            training.decisive(),
        ]
    )


def train(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: str | Path,
    parent: Model,
    teacher: Model,
    out_dir: Path,
    *,
    inputs: str,
    labels_digest: str,
    store: str | None = None,
    subset: Subset | None = None,
    on_progress: Callable[[TrainProgress | ReadProgress], None],
) -> TrainResult:
    """Train the recipe's student on a finished label dataset and export it to out_dir.

    labels: where it is, for every node; parent: what student.model names; store: URL of the folder
    that out_dir's parent is a copy of, where that is no disk that all nodes share; subset: the
    train rows that a classifier learns, all by default. Ray is up.
    Raises RecipeError, DataError, ModelError or ClusterError.
    """
    from journeyman.student import loop

    check(recipe)
    rows = loop.work_folder(out_dir, inputs, store).below("rows")
    if recipe.learner().kind == "classifier":
        load = _classifying(recipe, labels, corpus_dir, parent, rows, subset, told(on_progress))
    else:
        load = _causal(recipe, labels, corpus_dir, parent, teacher, rows, told(on_progress))
    return loop.train(
        recipe,
        load,
        parent,
        out_dir,
        inputs=inputs,
        labels_digest=labels_digest,
        store=store,
        on_progress=on_progress,
    )


def told(tell: Callable[[ReadProgress], None]) -> dataset.Over:
    """Labels through Ray Data, and how far it is."""

    def over(where: str | Path, make: dataset.Make) -> Iterator[pa.Table]:
        n_rows = 0
        for table in dataset.streamed(where, make):
            n_rows += len(table)
            tell(ReadProgress(rows=n_rows))
            yield table
        tell(ReadProgress(rows=n_rows, done=True))

    return over


def _classifying(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: str | Path,
    parent: Model,
    rows: Mirror,
    subset: Subset | None,
    over: dataset.Over,
) -> Load:
    """Rows are written here, once, for all workers."""
    from journeyman.student import class_rows, classifying

    student = recipe.learner()
    if not rows.pull():
        class_rows.build(
            labels,
            corpus_dir,
            classifying.load_tokenizer(parent.path, student),
            student,
            rows.local,
            hard_labels=recipe.training.hard_labels,
            subset=subset,
            over=over,
        )
        rows.push()
    return partial(
        _of_parent,
        classifying.Classifying,
        parent,
        student.revision,
        student=student,
        training=recipe.training,
        read_rows=partial(_class_rows, rows),
    )


def _class_rows(rows: Mirror) -> tuple[TrainRows, HeldOutRows]:
    from journeyman.student import class_rows

    rows.pull()
    return class_rows.load(rows.local)


def _of_parent(
    make: Callable[..., Learner],
    parent: Model,
    revision: str | None,
    folder: Path | None,
    device: torch.device,
    **given: Any,
) -> Learner:
    """A learner, made on the node of a worker, where the parent may lie elsewhere."""
    model = models.here(parent, lambda: models.resolve(parent.reference, revision))
    return make(folder, device, model_dir=model.path, **given)


def _causal(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: str | Path,
    parent: Model,
    teacher: Model,
    rows: Mirror,
    over: dataset.Over,
) -> Load:
    """Rows are written here, once, for all workers."""
    rows.pull()
    if not _are_written(rows.local):  # else it was known before them, and may be trained by now
        check_vocabulary(recipe, parent, teacher)
    write_rows(recipe, labels, corpus_dir, parent, teacher, rows.local, over=over)
    rows.push()
    return causal_load(recipe, parent, rows)


def write_rows(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: str | Path,
    parent: Model,
    teacher: Model,
    rows_dir: Path,
    splits: Sequence[str] = ("train", "calibrate"),
    *,
    over: dataset.Over = dataset.made,
) -> None:
    """A label dataset as tokens that the recipe's student learns, unless they are there; over: as
    of ``token_rows.build``.

    Whether it could learn them is asked by ``check_vocabulary``, before: here it may have.
    """
    from journeyman.student import token_rows
    from journeyman.student.models import load_tokenizer

    if _are_written(rows_dir, splits):
        return
    other = _other_tokens(recipe, parent, teacher)
    aligns = recipe.training.divergence == "uld"
    own_tokens = _in_own_tokens(recipe, other)
    as_text = own_tokens and not aligns
    _check_labels(labels, recipe, None if as_text else teacher)
    tokenizer = load_tokenizer(parent.path if own_tokens else teacher.path)
    tokenizer.save_pretrained(rows_dir / token_rows.TOKENIZER)  # the student's from now on
    counts = token_rows.build(
        labels,
        corpus_dir,
        recipe.labels,
        tokenizer,
        recipe.learner().max_length,
        rows_dir,
        as_text=as_text,
        row_weight=recipe.training.row_weight,
        reasonings=recipe.training.rationale_weight > 0,
        teacher=load_tokenizer(teacher.path) if aligns else None,
        splits=splits,
        gold=recipe.certify.answer_pattern is None,  # else it is a part of what is written
        over=over,
    )
    _say_what_is_missing(
        counts, sum(counts[split] for split in splits), recipe.learner().max_length
    )


def _are_written(rows_dir: Path, splits: Sequence[str] = ("train", "calibrate")) -> bool:
    return all((rows_dir / split).exists() for split in splits)


def _say_what_is_missing(counts: Mapping[str, int], n_rows: int, max_length: int) -> None:
    if n := counts["cut"]:
        _log.warning(
            "%s of %s rows are longer than student.max_length (%s tokens): they lose the beginning "
            "of their prompt, then the end of their answer; raise it if that is many.",
            f"{n:,}", f"{n_rows:,}", max_length,
        )  # fmt: skip
    if n := counts["left_out"]:
        _log.warning("%s rows have nothing to learn within student.max_length.", f"{n:,}")


def causal_load(recipe: Recipe, parent: Model, rows: Mirror) -> Load:
    """What a worker calls for a language model that learns these rows."""
    return partial(
        _of_parent,
        _causal_learner,
        parent,
        recipe.learner().revision,
        student=recipe.learner(),
        training=recipe.training,
        rows=rows,
    )


def _causal_learner(
    folder: Path | None, device: torch.device, *, rows: Mirror, **given: Any
) -> Learner:
    from journeyman.student.causal_learner import Causal

    rows.pull()
    return Causal(folder, device, rows_dir=rows.local, **given)


def _check_labels(labels: str | Path, recipe: Recipe, teacher: Model | None) -> None:
    """Raises DataError for a dataset of another kind, or not in the tokens of ``teacher``."""
    identity = dataset.finished_manifest(LabelStore(labels))["identity"]
    if identity["kind"] != recipe.labels.kind:
        raise DataError(
            f"{labels} holds labels of kind {identity['kind']}, and labels.kind is "
            f"{recipe.labels.kind}; set labels.kind: {identity['kind']}, or label again with "
            "journeyman label --new."
        )
    recorded = identity["teacher"]
    if teacher and recorded.get("tokenizer") != teacher.tokenizer_digest:
        raise DataError(
            f"{labels} is in the tokens of {recorded.get('model', 'another teacher')}, and "
            f"teacher.model, {teacher.reference}, has another tokenizer; name the teacher that "
            "labeled, or label again with journeyman label --new."
        )
