"""The cascade as a Ray Serve application. From the root of the repository:

    serve run serve.app:app bundle=runs/routing/bundle
    serve deploy serve/cascade.yaml

Checks that bundle, recipe and models belong together before anything starts.
"""

# No `from __future__ import annotations`: Ray Serve reads the builder's annotation, and a string
# tells it nothing.
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from journeyman import cluster
from journeyman.cascade import keys
from journeyman.certify.bundle import WrittenBundle
from journeyman.errors import JourneymanError, RecipeError
from journeyman.recipe import Labels, Recipe
from journeyman.recipe.serving import StudentReplicas, TeacherReplicas
from serve import loading, routing
from serve.agreement import Agreement
from serve.ingress import Ingress, IngressSpec
from serve.ports import check_port_of_serve_run
from serve.scaling import BusyStudents, RisingLoad
from serve.student_replicas import INGRESS, Student
from serve.students import STUDENT_CPUS
from serve.teacher import Teacher

# Serve counts a request that waits for a model as load on the ingress. The bounds that refuse
# requests are our own (cascade.max_queued_requests and max_student_queue), with a time to come back
# that is computed; Serve's must never be what holds one back,
_ROOM_FOR_ACCEPTED = 500
# and only refuses, in its proxies and in plain text, where a replica is behind with refusing. A
# burst that is being handed on counts as waiting there, too.
_MOST_IN_PROXY = 1000
_BEHIND = {"status_code": 503, "retry_after_s": 5.0}
_UPSCALE_DELAY_S = 5.0  # an engine takes longer to start than a burst to show
_LOOK_BACK_S = 5.0
_REPORT_EVERY_S = 1.0
_DRAIN_MARGIN_S = 5.0


class AppArgs(BaseModel):
    """The NAME=VALUE words behind ``serve run serve.app:app``."""

    model_config = ConfigDict(extra="allow")  # so that we, not pydantic, say what is unknown

    bundle: str | None = None


def app(args: AppArgs) -> Application:
    """The builder for ``serve run`` and ``serve deploy``; raises JourneymanError.

    Within ``serve run`` an error, a taken port included, ends the command with one sentence.
    """
    try:
        application = build(_bundle(args))
        check_port_of_serve_run()
        return application
    except JourneymanError as error:
        import click

        if click.get_current_context(silent=True) is None:
            raise
        # `serve` is a click program, and only click's own errors spare the reader a traceback.
        raise click.ClickException(str(error)) from error


def build(
    bundle: str | Path,
    may_ask: tuple[keys.Key, ...] | None = None,
    keeps_feedback: bool = True,
) -> Application:
    """Of a bundle's folder or URL; may_ask: the keys, in place of those that the recipe and the
    environment name; keeps_feedback: if its recipe says so. Raises BundleMismatch, ModelError,
    RecipeError."""
    loaded = loading.load(bundle)
    if not keeps_feedback:
        loaded = loading.without_feedback(loaded)
    settings = loaded.recipe
    spec = IngressSpec(loaded=loaded, keys=_keys(settings) if may_ask is None else may_ask)
    question = loading.question(loaded)
    teacher = _teacher(settings, question, loaded.bundle.columns).bind(
        settings.teacher,
        question,
        loaded.bundle.columns,
        loaded.teacher,
        node_labels=settings.cascade.node_labels,
    )
    agreement = serve.deployment(
        Agreement,
        name="Agreement",
        logging_config={"enable_access_log": False},
        max_ongoing_requests=_ROOM_FOR_ACCEPTED,
        ray_actor_options=_actor(settings, 0),
        graceful_shutdown_timeout_s=_drain_s(settings),
    ).bind(
        settings.cascade.breaker.probe_timeout_s,
        teacher_may_sleep=settings.cascade.teacher_replicas.min == 0,
    )
    students = settings.cascade.student_replicas
    if loading.is_apart(loaded):  # then the ingress computes nothing
        by = (
            {"target_ongoing_requests": settings.teacher.max_num_seqs}
            if isinstance(loaded.bundle, WrittenBundle)
            else _by_busy_students(students.busy)
        )
        student = _student(settings, **by).bind(loaded)
        ingress = _ingress(settings, 0, num_replicas=students.min)
        return ingress.bind(spec, teacher, agreement, student)
    scaling = _scaling(students, **_by_busy_students(students.busy))
    return _ingress(settings, STUDENT_CPUS, **scaling).bind(spec, teacher, agreement)


def _ingress(settings: Recipe, n_cpus: float, **scaling: Any) -> Any:
    return serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        max_ongoing_requests=_most_waiting(settings) + _ROOM_FOR_ACCEPTED,
        max_queued_requests=_MOST_IN_PROXY,
        backpressure_config=_BEHIND,
        ray_actor_options=_actor(settings, n_cpus),
        graceful_shutdown_timeout_s=_drain_s(settings),
        **scaling,
    )


def _most_waiting(settings: Recipe) -> int:
    """Requests of one text each in a replica of the ingress, before it refuses."""
    return settings.cascade.max_queued_requests + settings.cascade.max_student_queue


def _teacher(settings: Recipe, question: Labels, columns: Sequence[str]) -> Any:
    cascade = settings.cascade
    spread = settings.teacher.spread  # then the engine has its GPUs reserved itself
    return serve.deployment(
        Teacher,
        name="Teacher",
        # The ingress logs each request; here it would be each probe, too.
        logging_config={"enable_access_log": False},
        max_ongoing_requests=cascade.max_queued_requests + _ROOM_FOR_ACCEPTED,
        ray_actor_options=_actor(
            settings, cascade.teacher_cpus, 0 if spread else cascade.teacher_gpus
        ),
        graceful_shutdown_timeout_s=_drain_s(settings),
        **_scaling(cascade.teacher_replicas, **_by_load(cascade.teacher_replicas)),
        **(routing.of_teacher(question, columns) if cascade.teacher_replicas.max > 1 else {}),
    )


def _student(settings: Recipe, **by: Any) -> Any:
    cascade = settings.cascade
    return serve.deployment(
        Student,
        name="Student",
        logging_config={"enable_access_log": False},
        max_ongoing_requests=cascade.max_student_queue + _ROOM_FOR_ACCEPTED,
        ray_actor_options=_actor(settings, cascade.student_cpus, cascade.student_gpus),
        graceful_shutdown_timeout_s=_drain_s(settings),
        **_scaling(cascade.student_replicas, **by),
        **(routing.by_load() if cascade.student_replicas.max > 1 else {}),
    )


def _drain_s(settings: Recipe) -> float:
    """A replica that is to go answers what it has begun: a request's deadline, and what its answer
    takes on its way."""
    return settings.cascade.request_timeout_s + _DRAIN_MARGIN_S


def _actor(settings: Recipe, n_cpus: float, n_gpus: float = 0) -> dict[str, Any]:
    """Ray's options for a replica: what it reserves, where, and where it finds our code."""
    labels = settings.cascade.node_labels
    return {
        "num_cpus": n_cpus,
        "num_gpus": n_gpus,
        "runtime_env": {"env_vars": {"PYTHONPATH": cluster.python_path()}},
        **({"label_selector": labels} if labels else {}),
    }


def _scaling(replicas: TeacherReplicas | StudentReplicas, **by: Any) -> dict[str, Any]:
    """Of a deployment; by: what Serve's autoscaling config says of the load."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "upscale_delay_s": _UPSCALE_DELAY_S,
            "downscale_delay_s": replicas.idle_s,
            "look_back_period_s": _LOOK_BACK_S,
            "metrics_interval_s": _REPORT_EVERY_S,
            **by,
        }
    }


def _by_busy_students(wanted: float) -> dict[str, Any]:
    return {"policy": _policy(BusyStudents, wanted=wanted)}


def _by_load(replicas: TeacherReplicas) -> dict[str, Any]:
    return {
        "policy": _policy(RisingLoad, ahead_s=replicas.ahead_s),
        "target_ongoing_requests": replicas.requests_per_replica,
    }


def _policy(policy: type, **settings: float) -> dict[str, Any]:
    return {
        "policy_function": f"{policy.__module__}:{policy.__name__}",
        "policy_kwargs": settings,
    }


def _keys(settings: Recipe) -> tuple[keys.Key, ...]:
    """Read here, so that a wrong file is told before anything starts."""
    path = settings.cascade.api_keys or os.environ.get("JOURNEYMAN_API_KEYS")
    found = keys.read(Path(path)) if path else ()
    limited = [key.name for key in found if key.dollars_per_day is not None]
    if limited and not settings.cascade.state:
        raise RecipeError(
            f"{path}: the key {limited[0]} has a budget, and what it spends must outlive restarts; "
            "name a folder or an object store for it, cascade.state, and run `journeyman certify`."
        )
    price = settings.teacher.price
    if limited and not (price.per_million_prompt_tokens or price.per_million_output_tokens):
        raise RecipeError(
            f"{path}: the key {limited[0]} has a budget, and the teacher's tokens have no price; "
            "set teacher.price.per_million_prompt_tokens and run `journeyman certify`."
        )
    return found


def _bundle(args: AppArgs) -> str:
    if args.model_extra:
        unknown = ", ".join(args.model_extra)
        raise RecipeError(f"unknown argument {unknown}; there is one: bundle=FOLDER-or-URL.")
    if not args.bundle:
        raise RecipeError("no bundle named; say which: bundle=runs/routing/bundle.")
    return args.bundle
