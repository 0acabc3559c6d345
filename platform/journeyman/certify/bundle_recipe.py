"""The recipe in a bundle's folder, by which it is served: reading it, and taking up settings that
were changed since. What the certificate rests on stays as it was, whatever the recipe says now.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import files
from journeyman.errors import BundleMismatch, DataError
from journeyman.mirror import Mirror
from journeyman.recipe import Cascade, Feedback, Recipe, Teacher, differing_paths, parse
from journeyman.recipe.teacher import DECIDING_ARGUMENTS

RECIPE_FILE = "recipe.json"
# Of the teacher: what it costs, how long it is waited for, and how its engine is laid out. The
# longest text that it takes is not among them: the promise is about the texts that it answers.
_OF_TEACHER = (
    "price", "start_timeout_s", "request_timeout_s", "max_num_seqs", "max_num_batched_tokens",
    "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "cpu_kv_cache_gib",
)  # fmt: skip
_CERTIFIED_OF_CASCADE = ("combine",)  # all its other settings are of serving alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """recipe: what to serve by; taken_up: its settings that are others than before, and kept: those
    of the teacher and the cascade that stay as certified although they were changed; YAML paths."""

    recipe: Recipe
    taken_up: tuple[str, ...]
    kept: tuple[str, ...]

    def text(self) -> str:
        """Empty where there is nothing to say."""
        said = []
        if self.taken_up:
            said.append(f"the bundle takes up {', '.join(self.taken_up)}")
        if self.kept:
            stays = "stays" if len(self.kept) == 1 else "stay"
            said.append(f"{', '.join(self.kept)} {stays} as certified")
        return "; ".join(said)


def recipe_of(bundle_dir: Path) -> Recipe:
    """What a bundle is served by; raises BundleMismatch, and RecipeError for one that this version
    does not read."""
    path = bundle_dir / RECIPE_FILE
    try:
        content: Any = files.read_json(path)
    except DataError as error:
        raise BundleMismatch(
            f"{path}: missing or damaged; it says how the teacher is asked. "
            "Run `journeyman certify` again."
        ) from error
    return parse(content, str(path))


def certified(bundle_dir: Path, inputs: str) -> dict[str, Any] | None:
    """The step's manifest, where there is a bundle of these inputs and a recipe to serve it by."""
    try:
        manifest: dict[str, Any] = files.read_json(bundle_dir / "manifest.json")
        files.read_json(bundle_dir / RECIPE_FILE)
    except DataError:
        return None
    return manifest if manifest.get("inputs") == inputs else None


def take_up(bundle: Mirror, asked: Recipe) -> Renewed:
    """Have the bundle there be served by the settings of a recipe that has become another since, as
    far as its certificate does not rest on them. Raises as ``recipe_of``, and ClusterError."""
    found = renewed(recipe_of(bundle.local), asked)
    if found.taken_up:
        bundle.write(RECIPE_FILE, files.as_json(found.recipe.model_dump(mode="json")))
    return found


def renewed(recorded: Recipe, asked: Recipe) -> Renewed:
    """recorded: by which the bundle was certified, or served since."""
    certified = {name: getattr(recorded.cascade, name) for name in _CERTIFIED_OF_CASCADE}
    changes: dict[str, Any] = {
        "cascade": asked.cascade.model_copy(
            update=certified | {"feedback": _feedback(recorded.cascade, asked.cascade)}
        ),
        "teacher": _teacher(recorded.teacher, asked.teacher),
        "cluster": asked.cluster,  # which an engine's layout has to go with; serving reads none
    }
    together = recorded.model_copy(update=changes)
    return Renewed(
        recipe=parse(together.model_dump(mode="json")),
        taken_up=_differing(recorded, together),
        kept=_differing(together, asked),
    )


def _feedback(recorded: Cascade, asked: Cascade) -> Feedback | None:
    """Where it goes stays: what audits have found of the bundle, and have tightened its threshold
    by, lies there."""
    if recorded.feedback is None or asked.feedback is None:
        return asked.feedback
    return asked.feedback.model_copy(update={"to": recorded.feedback.to})


def _teacher(recorded: Teacher, asked: Teacher) -> Teacher:
    arguments = {
        **{n: value for n, value in recorded.engine_args.items() if n in DECIDING_ARGUMENTS},
        **{n: value for n, value in asked.engine_args.items() if n not in DECIDING_ARGUMENTS},
    }
    changes = {name: getattr(asked, name) for name in _OF_TEACHER}
    return recorded.model_copy(update=changes | {"engine_args": arguments})


def _differing(one: Recipe, other: Recipe) -> tuple[str, ...]:
    here, there = one.model_dump(mode="json"), other.model_dump(mode="json")
    return tuple(
        path
        for name in ("cascade", "teacher")
        for path in differing_paths(here[name], there[name], name)
    )
