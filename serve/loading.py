"""A bundle's folder, and all that must fit it: recipe, student, teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from journeyman import models, recipe
from journeyman.cascade import fitting
from journeyman.certify import bundle as bundles
from journeyman.certify import judging, written
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from journeyman.certify.bundle_recipe import recipe_of as recipe_of
from journeyman.errors import BundleMismatch, RecipeError
from journeyman.folder import Folder
from journeyman.mirror import Mirror, reading_copy_of
from journeyman.models import Model
from journeyman.recipe import Classes, Generate, Labels

_STUDENT = "student"  # the name of its folder beside the bundle's


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What belongs together, checked."""

    bundle: PolicyBundle | WrittenBundle
    recipe: recipe.Recipe
    student: Model
    teacher: Model
    where: str  # the bundle's folder, or its URL


def here(where: str | Path) -> Path:
    """A bundle's folder on this node; one behind a URL is fetched, with the student beside it.

    Raises BundleMismatch where there is none; ClusterError.
    """
    if directory := Folder(where).directory:
        return directory
    url = str(where).rstrip("/")
    run_url, _, name = url.rpartition("/")
    run = Mirror(local=reading_copy_of(run_url), url=run_url)
    for part in (name, _STUDENT):
        if not run.below(part).pull():
            raise BundleMismatch(f"{run_url}/{part}: not there, or being written; look at bundle.")
    return run.local / name


def load(where: str | Path) -> Loaded:
    """Raises BundleMismatch, ModelError, RecipeError, ClusterError."""
    bundle_dir = here(where)
    bundle = bundles.load_any(bundle_dir)
    settings = recipe_of(bundle_dir)
    labels = _asked(settings, bundle)
    student = models.resolve(str(_student_folder(bundle.student, bundle_dir, str(where))))
    before = [models.resolve(str(folder)) for folder in _before(bundle, bundle_dir)]
    if settings.teacher.gives_text_alone or settings.ensemble:
        raise RecipeError(
            "serving runs the teacher on an engine of its own: a recipe with teacher.url, with "
            "teacher.column or with an ensemble can be labeled, trained on and certified, but not "
            "served yet."
        )
    teacher = models.teacher(settings.teacher)
    fitting.check(bundle, student, teacher, labels, _asked_of_judge(settings, bundle), before)
    return Loaded(
        bundle=bundle,
        recipe=settings,
        student=student,
        teacher=teacher,
        where=str(where),
    )


def without_feedback(loaded: Loaded) -> Loaded:
    """The same for requests that are no traffic, of which nothing is kept or watched."""
    cascade = loaded.recipe.cascade.model_copy(update={"feedback": None})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"cascade": cascade}))


def question(loaded: Loaded) -> Labels:
    """What the teacher answers."""
    if isinstance(loaded.bundle, PolicyBundle):
        return loaded.recipe.classes()
    return written.question(loaded.recipe)


def is_judged(loaded: Loaded) -> bool:
    """Whether the promise is by a judge's verdicts."""
    return isinstance(loaded.bundle, WrittenBundle) and loaded.bundle.judge is not None


def student_here(loaded: Loaded) -> Path:
    """The student's folder on this node, which may be another than the one that loaded.

    Raises BundleMismatch where another student has taken its place since.
    """
    folder = here(loaded.where).parent / _STUDENT if _far(loaded.where) else loaded.student.path
    bundle = loaded.bundle
    _check_certified(folder, bundle, bundle.student_digest, bundle.student_tokenizer_digest)
    return folder


def students_here(loaded: Loaded) -> list[Path]:
    """The same of all that are asked, in their order."""
    bundle = loaded.bundle
    stages = bundle.before if isinstance(bundle, PolicyBundle) else ()
    before = _before(bundle, here(loaded.where)) if stages else []
    for folder, stage in zip(before, stages, strict=True):
        _check_certified(folder, bundle, stage.student_digest, stage.student_tokenizer_digest)
    return [*before, student_here(loaded)]


def _check_certified(
    folder: Path, bundle: PolicyBundle | WrittenBundle, weights: str, tokenizer: str
) -> None:
    found = models.resolve(str(folder))
    if (found.weights_digest, found.tokenizer_digest) != (weights, tokenizer):
        raise BundleMismatch(
            f"{folder}: not the student that bundle {bundle.bundle_id} was certified with; it was "
            "trained again since. Run `journeyman certify` and deploy that bundle."
        )


def _before(bundle: PolicyBundle | WrittenBundle, bundle_dir: Path) -> list[Path]:
    """Folders of the students that are asked before the bundle's own, which lie in its own."""
    stages = bundle.before if isinstance(bundle, PolicyBundle) else ()
    return [bundle_dir / bundles.folder_before(i) for i in range(len(stages))]


def is_apart(loaded: Loaded) -> bool:
    """Whether its student has a deployment of its own."""
    return isinstance(loaded.bundle, WrittenBundle) or loaded.recipe.cascade.scores_apart


def student_key(bundle: PolicyBundle | WrittenBundle) -> str:
    """What tells students apart: one that is sampled for its confidence is asked in another way."""
    facts: list[Any] = [bundle.student_digest, bundle.student_tokenizer_digest]
    if isinstance(bundle, WrittenBundle) and bundle.samples:
        facts.append(bundle.samples.model_dump())
    if isinstance(bundle, PolicyBundle) and bundle.before:
        facts += [[one.student_digest, one.student_tokenizer_digest] for one in bundle.before]
    return recipe.digest(facts)


def check_fits(loaded: Loaded, running: Loaded) -> None:
    """Raises BundleMismatch unless the teacher that runs for one can answer for the other, and the
    students of both have room where one runs."""
    bundle = loaded.bundle
    differing = [
        *fitting.differing(bundle, running.bundle),
        *fitting.asked_otherwise(loaded.recipe, running.recipe),
    ]
    if differing:
        raise BundleMismatch(
            f"bundle {bundle.bundle_id} was certified with another teacher or prompt than what "
            f"runs ({', '.join(differing)}): deploy it anew, it cannot be swapped in."
        )
    if is_apart(loaded) and not is_apart(running):
        raise BundleMismatch(
            f"bundle {bundle.bundle_id}: its student wants replicas of its own "
            "(cascade.student_apart, cascade.student_gpus), which the cascade that runs has not: "
            "deploy it anew, it cannot be swapped in."
        )
    both = loaded.recipe.teacher, running.recipe.teacher
    taken = sum(teacher.gpu_memory_utilization for teacher in both)
    another = student_key(bundle) != student_key(running.bundle)
    writes = isinstance(bundle, WrittenBundle)  # and so has an engine, which takes its share whole
    if writes and another and running.recipe.cascade.student_gpus and taken > 1:
        raise BundleMismatch(
            f"bundle {bundle.bundle_id}: its student has no room on a GPU beside the one that "
            f"answers, as teacher.gpu_memory_utilization of both add up to {taken:g}. Deploy it "
            "anew; or, to have it swapped in, set that to 0.45 in the recipes of both, run "
            "`journeyman certify` with each, which certifies nothing anew for it, and deploy the "
            "one that answers anew first."
        )


def _asked(settings: recipe.Recipe, bundle: PolicyBundle | WrittenBundle) -> Classes | Generate:
    """What is certified: the teacher's question, or that to a student that writes. Raises
    RecipeError for what serving cannot do."""
    if isinstance(bundle, PolicyBundle):
        return settings.classes()
    if bundle.columns != ("text",):
        raise RecipeError(
            f"labels.prompt takes the columns {', '.join(bundle.columns)}, and a prompt over HTTP "
            "is one text: name it {{ text }} to serve a student that writes."
        )
    return written.check(settings)


def _asked_of_judge(
    settings: recipe.Recipe, bundle: PolicyBundle | WrittenBundle
) -> Classes | None:
    if not isinstance(bundle, WrittenBundle) or bundle.judge is None:
        return None
    return judging.asked_of_judge(settings, written.question(settings))


def _student_folder(reference: str, bundle_dir: Path, where: str) -> Path:
    """Where the student was when it was certified, else beside the bundle, which may have moved."""
    certified = Path(reference)
    if certified.is_dir() and not _far(where):
        return certified
    return bundle_dir.resolve().parent / _STUDENT


def _far(where: str) -> bool:
    return Folder(where).directory is None
