"""Settings of ``training``, ``certify``, ``cascade`` and teachers that nothing would read; of
``training``, by what is learned, one table.

A recipe that sets one to another value than its default is refused where its file is loaded, and
not where it is read again from a finished run. ``student`` looks after its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from journeyman.recipe.labels import Classes, Generate, Logits, Rationales
from journeyman.recipe.serving import Cascade, Certify
from journeyman.recipe.student import Training
from journeyman.recipe.teacher import Teacher

if TYPE_CHECKING:
    from journeyman.recipe.loading import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lesson:
    """What a student learns by, as far as it decides which settings count."""

    training: Training
    classes: bool
    rationales: bool
    distributions: bool  # over tokens
    draws: bool  # in place of the likeliest tokens

    @property
    def diverges(self) -> bool:
        """Whether ``divergence`` is part of the loss."""
        return self.distributions and self.training.cross_entropy < 1

    @property
    def softened(self) -> bool:
        """The same, on-policy rounds included, which have a divergence of their own."""
        return self.diverges or (self.distributions and self.training.on_policy is not None)

    @property
    def mixes(self) -> bool:
        rounds = self.training.on_policy
        by_rounds = rounds is not None and rounds.divergence == "jsd"
        return (self.diverges and self.training.divergence == "jsd") or by_rounds

    @property
    def smooths(self) -> bool:
        tokens_alone = not self.classes and not self.distributions
        return self.classes or tokens_alone or self.training.cross_entropy > 0

    @property
    def weighs_text(self) -> bool:
        """Text alone is learned by nothing but cross-entropy, so that a share of 1 is true."""
        return self.distributions or (not self.classes and self.training.cross_entropy == 1)


_CLASSES = (lambda one: one.classes, "labels.kind: classes")
_DISTRIBUTIONS = (
    "distributions over the student's tokens: labels.kind: logits or generate of a teacher that is "
    "neither behind a URL nor a column"
)
_IN_THE_LOSS = f"{_DISTRIBUTIONS}, and training.cross_entropy below 1"
# Of a run that was trained before this was refused its inputs' digest is all that is kept, and the
# setting is in it.
LEAVE_OUT = "leave it out (a finished student that was trained with it is trained anew then)"
# When each is read, and what it goes with, in words.
_READ: dict[str, tuple[Callable[[_Lesson], bool], str]] = {
    "head_learning_rate": _CLASSES,
    "gold_weight": _CLASSES,
    "hard_labels": _CLASSES,
    "class_weight": _CLASSES,
    "temperature": (
        lambda one: one.classes or one.softened,
        f"labels.kind: classes, or with {_IN_THE_LOSS}",
    ),
    "divergence": (lambda one: one.diverges, _IN_THE_LOSS),
    "tail": (
        lambda one: one.softened and not one.draws,
        f"{_IN_THE_LOSS}, in a codec other than sampled",
    ),
    "beta": (lambda one: one.mixes, "divergence: jsd"),
    "skew": (
        lambda one: one.diverges and one.training.divergence == "skewed_kl",
        "training.divergence: skewed_kl",
    ),
    "cross_entropy": (lambda one: one.weighs_text, _DISTRIBUTIONS),
    "label_smoothing": (
        lambda one: one.smooths,
        "labels.kind: classes, or with training.cross_entropy above 0",
    ),
    "rationale_weight": (lambda one: one.rationales, "labels.kind: rationales"),
}

_OF_WRITING = ("match", "samples")  # of ``certify``
_OF_SCORING = ("student_apart", "max_batch_size", "max_batch_tokens")  # of ``cascade``


def names(recipe: Recipe, *, as_text: bool = False) -> tuple[str, ...]:
    """Settings of ``training`` that are not the default and that nothing reads.

    as_text: the student has other tokens than the teacher, whose distributions it does not learn.
    """
    labels, training = recipe.labels, recipe.training
    tokens = isinstance(labels, Logits | Generate) and not recipe.teacher.gives_text_alone
    lesson = _Lesson(
        training=training,
        classes=isinstance(labels, Classes),
        rationales=isinstance(labels, Rationales),
        distributions=tokens and not as_text,
        draws=isinstance(labels, Logits | Generate) and labels.codec == "sampled",
    )
    fields = Training.model_fields
    return tuple(
        name
        for name, (reads, _) in _READ.items()
        if getattr(training, name) != fields[name].default and not reads(lesson)
    )


def sentences(recipe: Recipe) -> list[str]:
    """What to say of each."""
    said = [
        f"training.{name} would change nothing: it goes with {_READ[name][1]}; {LEAVE_OUT}."
        for name in names(recipe)
    ]
    said += [
        f"{where}.revision would change nothing: it is of a repository on the hub, and this "
        f"teacher is {'behind a URL' if teacher.url else 'in a column'}; leave it out."
        for where, teacher in _teachers(recipe)
        if teacher.revision is not None and teacher.gives_text_alone
    ]
    columns = recipe.corpus.columns
    said += [
        f"corpus.columns.meta: {name} stands for {what} in templates, which could not name that "
        "column; leave it out, or give it another name in the file."
        for name, what in (("text", "the row's text"), ("label", "the words of a label"))
        if name in columns.meta and name not in (columns.text, columns.label)
    ]
    if recipe.student and recipe.student.kind != "causal":
        fields = Certify.model_fields
        said += [
            f"certify.{name} would change nothing: it goes with a student that writes "
            "(student.kind: causal); leave it out."
            for name in _OF_WRITING
            if getattr(recipe.certify, name) != fields[name].default
        ]
        cpus = Cascade.model_fields["student_cpus"].default
        if recipe.cascade.student_cpus != cpus and not recipe.cascade.scores_apart:
            said.append(
                "cascade.student_cpus would change nothing: a student that classifies is scored in "
                "the ingress, on one CPU; set cascade.student_apart, or leave it out."
            )
    elif recipe.student:
        fields = Cascade.model_fields
        said += [
            f"cascade.{name} would change nothing: it goes with a student that classifies, and the "
            "engine of one that writes (student.kind: causal) has a deployment and batches of its "
            "own; leave it out."
            for name in _OF_SCORING
            if getattr(recipe.cascade, name) != fields[name].default
        ]
    return said


def _teachers(recipe: Recipe) -> Iterator[tuple[str, Teacher]]:
    """All of them, by YAML path."""
    yield "teacher", recipe.teacher
    for name, teacher in recipe.ensemble.items():
        yield f"ensemble.{name}", teacher
    if recipe.certify.judge.teacher:
        yield "certify.judge.teacher", recipe.certify.judge.teacher
