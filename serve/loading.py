"""A bundle's folder, and all that must fit it: recipe, student, teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import files, models, recipe
from journeyman.cascade import fitting
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.step import RECIPE_FILE
from journeyman.errors import BundleMismatch, DataError, RecipeError
from journeyman.models import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What belongs together, checked."""

    bundle: PolicyBundle
    recipe: recipe.Recipe
    student: Model
    teacher: Model


def load(bundle_dir: Path) -> Loaded:
    """Raises BundleMismatch, ModelError, RecipeError."""
    bundle = bundles.load(bundle_dir)
    settings = recipe_of(bundle_dir)
    labels = settings.classes()
    student = models.resolve(str(_student_folder(bundle.student, bundle_dir)))
    if settings.teacher.url or settings.ensemble:
        raise RecipeError(
            "serving runs the teacher on an engine of its own: a recipe with teacher.url or with "
            "an ensemble can be labeled, trained on and certified, but not served yet."
        )
    teacher = models.teacher(settings.teacher)
    fitting.check(bundle, student, teacher, labels)
    return Loaded(bundle=bundle, recipe=settings, student=student, teacher=teacher)


def recipe_of(bundle_dir: Path) -> recipe.Recipe:
    """The recipe that a bundle was certified with; raises BundleMismatch."""
    try:
        content: Any = files.read_json(bundle_dir / RECIPE_FILE)
    except DataError as error:
        raise BundleMismatch(
            f"{bundle_dir / RECIPE_FILE}: missing or damaged; it says how the teacher is asked. "
            "Run `journeyman certify` again."
        ) from error
    return recipe.parse(content, str(bundle_dir / RECIPE_FILE))


def check_same_teacher(bundle: PolicyBundle, running: PolicyBundle) -> None:
    """Raises BundleMismatch unless the teacher that runs for one can answer for the other."""
    asked = (
        "teacher_digest",
        "teacher_tokenizer_digest",
        "prompt_digest",
        "label_names",
        "columns",
    )
    differing = [name for name in asked if getattr(bundle, name) != getattr(running, name)]
    if differing:
        raise BundleMismatch(
            f"bundle {bundle.bundle_id} was certified with another teacher or prompt than the one "
            f"that runs ({', '.join(differing)}): deploy it anew, it cannot be swapped in."
        )


def _student_folder(reference: str, bundle_dir: Path) -> Path:
    """Where the student was when it was certified, else beside the bundle, which may have moved."""
    certified = Path(reference)
    return certified if certified.is_dir() else bundle_dir.resolve().parent / "student"
