"""The cascade as a Ray Serve application. From the root of the repository:

    serve run serve.app:app bundle=runs/demo/bundle
    serve deploy serve/cascade.yaml

Checks that bundle, recipe and models belong together before anything starts.
"""

# No `from __future__ import annotations`: Ray Serve reads the builder's annotation, and a string
# tells it nothing.
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from journeyman import cluster, files, models, recipe
from journeyman.cascade import fitting
from journeyman.certify import bundle as bundles
from journeyman.errors import BundleMismatch, DataError, JourneymanError, RecipeError
from journeyman.prompts import Prompt
from serve.ingress import STUDENT_CPUS, Ingress, IngressSpec
from serve.ports import check_port_of_serve_run
from serve.teacher import Teacher

RECIPE_FILE = "recipe.json"

# Serve counts a request that waits for the teacher as load on the ingress. The bounds that refuse
# requests are our own (cascade.max_queued_requests); this one must never be what holds one back.
_ROOM_FOR_ACCEPTED = 500


class AppArgs(BaseModel):
    """The NAME=VALUE words behind ``serve run serve.app:app``."""

    model_config = ConfigDict(extra="allow")  # so that we, not pydantic, say what is unknown

    bundle: str | None = None


def app(args: AppArgs) -> Application:
    """The builder for ``serve run`` and ``serve deploy``; raises JourneymanError.

    Within ``serve run`` an error, a taken port included, ends the command with one sentence.
    """
    try:
        application = build(_bundle_dir(args))
        check_port_of_serve_run()
        return application
    except JourneymanError as error:
        import click

        if click.get_current_context(silent=True) is None:
            raise
        # `serve` is a click program, and only click's own errors spare the reader a traceback.
        raise click.ClickException(str(error)) from error


def build(bundle_dir: Path) -> Application:
    """The application of a bundle folder; raises BundleMismatch, ModelError, RecipeError."""
    bundle = bundles.load(bundle_dir)
    settings = recipe_of(bundle_dir)
    labels = settings.classes()
    _check_prompt(labels)
    student = models.resolve(str(_student_folder(bundle.student, bundle_dir)))
    if settings.teacher.url or settings.ensemble:
        raise RecipeError(
            "serving runs the teacher on an engine of its own: a recipe with teacher.url or with "
            "an ensemble can be labeled, trained on and certified, but not served yet."
        )
    teacher = models.teacher(settings.teacher)
    fitting.check(bundle, student, teacher, labels)
    cascade = settings.cascade
    runtime_env = {"env_vars": {"PYTHONPATH": cluster.python_path()}}
    teacher_deployment = serve.deployment(
        Teacher,
        name="Teacher",
        # The ingress logs each request; here it would be each probe, too.
        logging_config={"enable_access_log": False},
        max_ongoing_requests=cascade.max_queued_requests + _ROOM_FOR_ACCEPTED,
        ray_actor_options={
            "num_cpus": cascade.teacher_cpus,
            "num_gpus": cascade.teacher_gpus,
            "runtime_env": runtime_env,
        },
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Cascade",
        max_ongoing_requests=cascade.max_queued_requests + _ROOM_FOR_ACCEPTED,
        ray_actor_options={"num_cpus": STUDENT_CPUS, "runtime_env": runtime_env},
    )
    spec = IngressSpec(bundle=bundle, student=student, settings=cascade)
    return ingress.bind(spec, teacher_deployment.bind(settings.teacher, labels, teacher))


def _bundle_dir(args: AppArgs) -> Path:
    if args.model_extra:
        unknown = ", ".join(args.model_extra)
        raise RecipeError(f"unknown argument {unknown}; there is one: bundle=FOLDER.")
    if not args.bundle:
        raise RecipeError("no bundle named; say which: bundle=runs/demo/bundle.")
    return Path(args.bundle)


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


def _student_folder(reference: str, bundle_dir: Path) -> Path:
    """Where the student was when it was certified, else beside the bundle, which may have moved."""
    certified = Path(reference)
    return certified if certified.is_dir() else bundle_dir.resolve().parent / "student"


def _check_prompt(labels: recipe.Classes) -> None:
    """A request carries a text and no further columns."""
    for name, template in labels.templates().items():
        prompt = Prompt(template, name)
        if others := sorted(prompt.variables - {"text", "label"}):
            raise RecipeError(
                f"{name} names {', '.join(others)}, and a request to the cascade has only "
                "text; a recipe with such a template cannot be served yet."
            )
