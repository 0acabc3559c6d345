"""Whether a policy bundle, a recipe and two models belong together."""

from __future__ import annotations

from collections.abc import Sequence

from journeyman.certify.bundle import Bundle, PolicyBundle, WrittenBundle
from journeyman.errors import BundleMismatch
from journeyman.models import Model
from journeyman.recipe import Classes, Generate, Recipe, differing_paths
from journeyman.teacher.tasks import prompt_digest


def check(
    bundle: PolicyBundle | WrittenBundle,
    student: Model,
    teacher: Model,
    labels: Classes | Generate,
    judged: Classes | None = None,
    before: Sequence[Model] = (),
) -> None:
    """Raises BundleMismatch, with all that differs, unless the bundle was made for these.

    before: the students that are asked before this one.
    labels: what is asked: of the teacher; of students that write, of these; judged: what the judge
    is, where there is one.
    """
    pairs: dict[str, tuple[str | tuple[str, ...], str | tuple[str, ...]]] = {
        f"the student's weights ({student.path})": (bundle.student_digest, student.weights_digest),
        f"the teacher's weights ({teacher.path})": (bundle.teacher_digest, teacher.weights_digest),
        "the student's tokenizer": (bundle.student_tokenizer_digest, student.tokenizer_digest),
        "the teacher's tokenizer": (bundle.teacher_tokenizer_digest, teacher.tokenizer_digest),
        "the recipe's prompt": (bundle.prompt_digest, prompt_digest(labels)),
    }
    if isinstance(bundle, PolicyBundle) and isinstance(labels, Classes):
        pairs["the recipe's labels"] = bundle.label_names, tuple(labels.classes)
        for stage, model in zip(bundle.before, before, strict=True):
            whose = f"a student that is asked before ({model.path})"
            pairs[f"the weights of {whose}"] = stage.student_digest, model.weights_digest
            made_for = stage.student_tokenizer_digest
            pairs[f"the tokenizer of {whose}"] = made_for, model.tokenizer_digest
    if isinstance(bundle, WrittenBundle) and bundle.judge and judged:
        made_for = bundle.judge.prompt_digest
        pairs["the recipe's prompt to the judge"] = made_for, prompt_digest(judged)
    differing = [
        f"{name} (bundle: {_short(made_for)}, here: {_short(found)})"
        for name, (made_for, found) in pairs.items()
        if made_for != found
    ]
    if differing:
        raise BundleMismatch(
            f"policy bundle {bundle.bundle_id} was made for something else: it does not fit "
            f"{', nor '.join(differing)}. Run `journeyman certify` for what is here, or serve "
            "what was certified."
        )


def differing(bundle: Bundle, other: Bundle) -> list[str]:
    """Of what both were certified for, the fields in which they differ: with none, the teacher
    that runs for one can answer for the other."""
    asked = ["teacher_digest", "teacher_tokenizer_digest", "prompt_digest", "label_names",
             "columns"]  # fmt: skip
    return [name for name in asked if getattr(bundle, name, None) != getattr(other, name, None)]


def asked_otherwise(recipe: Recipe, other: Recipe) -> list[str]:
    """The settings in which the teachers of two recipes differ and that change what one says, by
    YAML path; labels that were made by one would be another dataset than the other's."""
    here, there = (one.teacher.decisive(one.labels.overflow) for one in (recipe, other))
    return list(differing_paths(here, there, "teacher"))


def _short(value: str | tuple[str, ...]) -> str:
    return value[:12] if isinstance(value, str) else ", ".join(value)
