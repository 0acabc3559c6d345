"""What a job takes along to a cluster: the code, the recipe as it will run, and small files of it.

Knows nothing of the cluster; refuses what would be lost, left behind or given away there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

import yaml

from journeyman import cluster, sources
from journeyman.errors import ClusterError, RecipeError
from journeyman.recipe import Recipe, Teacher

RECIPE = "recipe.yaml"
_CODE = ("platform/journeyman", "jobs", "serve")
_CODE_SUFFIXES = {".py", ".css", ".html", ".j2", ".typed"}
_MOST_BYTES = 64 << 20  # of a recipe's own files; Ray takes some hundred MB, and every node unpacks
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 12  # characters; what is shorter may stand in a recipe by chance
_SECRET = re.compile(
    r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b|\bAIza[A-Za-z0-9_-]{35}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bgithub_pat_\w{30,}|\bxox[abpr]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bjm-[A-Za-z0-9_-]{20,}"
    r"|://[^\s/:@]+:[^\s/@]+@"  # user and password in a URL
    r"|[?&](?:X-Amz-Signature|X-Goog-Signature|sig)=[^\s&]{16,}"  # a URL that opens by itself
)


def check(recipe: Recipe, environment: Mapping[str, str]) -> None:
    """Refuse a recipe that no cluster can run as it is; raises RecipeError.

    environment: of the process; what its variables called KEY, TOKEN, … hold must not be in the
    recipe, which anyone who sees the cluster's dashboard may read.
    """
    for name, where in _folders(recipe):
        if where and "://" not in where and not Path(where).is_absolute():
            raise RecipeError(
                f"{name}: {where} is relative, and a job's own folder goes when the job does: name "
                "an absolute path on a disk that all nodes share, or a URL."
            )
    for name, model in _models(recipe):
        path = Path(model)
        looks_local = model.startswith((".", "~")) or path.suffix == ".gguf" or path.exists()
        if "://" not in model and not path.is_absolute() and looks_local:
            raise RecipeError(
                f"{name}: {model} is a file or folder of this machine: name a hub id, or an "
                "absolute path that is the same on every node."
            )
    _check_secrets(recipe, environment)


def pack(recipe: Recipe | None, folder: Path) -> int:
    """Fill an empty folder for a job to run in, with the code alone or with a recipe and what it
    names; returns the bytes in it.

    Raises RecipeError where the recipe's files are too many for a job, DataError where one is not
    there, ClusterError where the code is not.
    """
    if not (cluster.CHECKOUT / "jobs" / "pipeline.py").is_file():
        raise ClusterError(
            f"{cluster.CHECKOUT} holds no jobs/, which a job runs: call journeyman from a clone of "
            "the repository that is installed with pip install --editable."
        )
    for top in _CODE:
        for file in (cluster.CHECKOUT / top).rglob("*"):
            if file.suffix in _CODE_SUFFIXES:
                _copy(file, folder / file.relative_to(cluster.CHECKOUT))
    if recipe:
        _pack_recipe(recipe, folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _pack_recipe(recipe: Recipe, folder: Path) -> None:
    own = list(_own_files(recipe))
    n_bytes = sum(file.stat().st_size for file in own)
    if n_bytes > _MOST_BYTES:
        raise RecipeError(
            f"corpus.sources: {', '.join(recipe.corpus.sources)}: {n_bytes / 1e6:,.0f} MB on this "
            f"machine, and a job takes {_MOST_BYTES / 1e6:,.0f} MB along at most: copy them to "
            "where all nodes see them, and name a URL (s3://, gs://) or an absolute path."
        )
    for file in own:
        _copy(file, folder / file)
    settings = yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )
    (folder / RECIPE).write_text(settings, encoding="utf-8")


def _folders(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    yield "output", recipe.output
    yield "labels.destination", recipe.labels.destination
    yield "labels.cache", recipe.labels.cache
    yield "corpus.feedback", recipe.corpus.feedback
    if recipe.cascade.feedback:
        yield "cascade.feedback.to", recipe.cascade.feedback.to
    yield "cascade.state", recipe.cascade.state
    yield "cascade.api_keys", recipe.cascade.api_keys


def _models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield from _models_of("teacher", recipe.teacher)
    for name, teacher in recipe.ensemble.items():
        yield from _models_of(f"ensemble.{name}", teacher)
    if recipe.student:
        yield "student.model", recipe.student.model


def _models_of(name: str, teacher: Teacher) -> Iterator[tuple[str, str]]:
    if not teacher.gives_text_alone:  # else it is a name that an API knows
        yield f"{name}.model", teacher.model
    if teacher.lora:
        yield f"{name}.lora", teacher.lora


def _check_secrets(recipe: Recipe, environment: Mapping[str, str]) -> None:
    # Not as JSON, which would escape what is looked for.
    text = yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, width=10**9)
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and value in text:
            raise RecipeError(
                f"the recipe holds the value of the environment variable {name}: take it out, and "
                f"hand it to the job with --env {name}."
            )
    if found := _SECRET.search(text):
        raise RecipeError(
            f"the recipe holds what looks like a credential ({found.group()[:7]}…): take it out, "
            "set it as an environment variable, and hand that to the job with --env NAME."
        )


def _own_files(recipe: Recipe) -> Iterator[Path]:
    """Files of relative sources: what is absolute, or a URL, is the cluster's."""
    relative = [
        source
        for source in recipe.corpus.sources
        if "://" not in source and not Path(source).is_absolute()
    ]
    for source in relative:
        if ".." in PurePath(source).parts:
            raise RecipeError(
                f"corpus.sources: {source} lies outside of {Path.cwd()}, the folder that the job "
                "takes its files from: call the command from a folder above both."
            )
    for found in sources.expand(relative):
        path = Path(found.removeprefix("file://"))
        path = path.relative_to(Path.cwd()) if path.is_absolute() else path
        files = path.rglob("*") if path.is_dir() else [path]
        yield from (file for file in files if file.is_file())


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)
