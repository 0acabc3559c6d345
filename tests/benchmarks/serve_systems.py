"""What serve_load.py compares the cascade with, on the same models: alone, and with one hop.

Each answers ``POST {"input": text}``. Scoring, batching and the engine are Journeyman's own, so
that what differs is the way through Ray Serve; ``ray.serve.llm`` brings its own engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import capture_systems
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from journeyman.cascade.batcher import Batcher
from journeyman.cascade.policy import Policy, student_answers
from journeyman.recipe import Recipe
from journeyman.student.models import Classifier
from serve.loading import Loaded
from serve.students import STUDENT_CPUS

LLM = "teacher"  # its model id in ray.serve.llm
_ROOM = 1_000  # requests at a time: none of the limits is to be met here
_START_TIMEOUT_S = 60.0


class Body(BaseModel):
    """One text to classify."""

    input: str


class Student:
    """The student behind the batcher that the cascade has."""

    def __init__(self, loaded: Loaded) -> None:
        policy = Policy.from_bundle(loaded.bundle)
        student = Classifier.load(loaded.student.path, threads=STUDENT_CPUS)
        student.pack()
        self._batcher = Batcher(
            lambda texts: student_answers(policy.decide_batch(student.logits(texts, 8))),
            loaded.recipe.cascade.max_batch_size,
        )

    def start(self) -> None:
        self._batcher.start()

    async def classify(self, text: str) -> dict[str, Any]:
        decision = (await self._batcher.submit([text]))[0]
        return {"label": decision.label, "confidence": decision.confidence}

    def api(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def started(_: FastAPI) -> AsyncIterator[None]:
            self.start()
            yield

        app = FastAPI(lifespan=started)

        @app.post("/")
        async def classify(body: Body) -> dict[str, Any]:
            return await self.classify(body.input)

        return app


class InServe:
    """The student in the ingress, as a user of Ray Serve writes it."""

    def __init__(self, loaded: Loaded) -> None:
        self._student = Student(loaded)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._student.api()


class Inner:
    """The student as a deployment of its own."""

    def __init__(self, loaded: Loaded) -> None:
        self._student = Student(loaded)
        self._student.start()

    async def label(self, texts: list[str]) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(self._student.classify(text) for text in texts)))


class Front:
    """Nothing but the way to another deployment: one hop."""

    def __init__(self, inner: DeploymentHandle | None, app_name: str = "", name: str = "") -> None:
        """inner: the handle; None takes the deployment of that name in that application."""
        self._inner = inner or serve.get_deployment_handle(name, app_name=app_name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()

        @app.post("/")
        async def classify(body: Body) -> dict[str, Any]:
            answers = await self._inner.label.remote([body.input])
            answer = answers[0]
            if isinstance(answer, dict):
                return answer
            return {"class_logprobs": [float(x) for x in answer.class_logprobs]}

        return app


def student_in_serve(loaded: Loaded) -> Application:
    return _ingress(InServe, "StudentAlone").bind(loaded)


def student_one_hop(loaded: Loaded) -> Application:
    inner = serve.deployment(
        Inner,
        name="Student",
        max_ongoing_requests=_ROOM,
        ray_actor_options={"num_cpus": 1, "runtime_env": _runtime_env()},
    )
    return _ingress(Front, "StudentFront").bind(inner.bind(loaded))


def teacher_one_hop(cascade_app: str) -> Application:
    """The teacher's replica of a running cascade, asked by an ingress that does nothing else."""
    return _ingress(Front, "TeacherFront").bind(None, cascade_app, "Teacher")


def ray_serve_llm(loaded: Loaded) -> Application:
    """The same weights and engine settings, without the batcher that delays the first token."""
    from ray.serve.llm import LLMConfig, build_openai_app

    teacher = loaded.recipe.teacher
    arguments = capture_systems.engine_arguments(teacher, loaded.teacher)
    config = LLMConfig(
        model_loading_config={"model_id": LLM, "model_source": arguments.pop("model")},
        engine_kwargs=arguments,
        deployment_config={
            "autoscaling_config": {"min_replicas": 1, "max_replicas": 1},
            "max_ongoing_requests": _ROOM,
        },
        runtime_env={"env_vars": capture_systems.environment(teacher) | _python_path()},
        placement_group_config={"bundles": [{"CPU": 1}]},
        experimental_configs={"stream_batching_interval_ms": 0},
        log_engine_metrics=False,
    )
    return build_openai_app({"llm_configs": [config]})


def scoring_request(settings: Recipe, text: str) -> dict[str, Any]:
    """A text's log-probability under each label, asked of OpenAI's completions endpoint.

    As many prompts as the cascade's teacher reads; what the client makes of the answer is not
    timed. Only for ``channel`` scoring.
    """
    from journeyman.prompts import Prompt

    labels = settings.classes()
    prompts = [
        "".join(piece for piece, _ in Prompt(template, name).segments({"text": ""}, words)) + text
        for name, template in labels.templates().items()
        for words in labels.classes.values()
    ]
    return {
        "model": LLM, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0,
    }  # fmt: skip


@contextlib.contextmanager
def bare_fastapi(loaded: Loaded, port: int) -> Iterator[str]:
    """The student in a process of its own under uvicorn, without Ray; yields its address."""
    import httpx

    process = multiprocessing.get_context("spawn").Process(target=_uvicorn, args=(loaded, port))
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(url, json={"input": "hello"}, timeout=10).raise_for_status()
                break
            if time.monotonic() > deadline or not process.is_alive():
                raise RuntimeError("the bare FastAPI process does not answer")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.join()


def _uvicorn(loaded: Loaded, port: int) -> None:
    import uvicorn

    uvicorn.run(Student(loaded).api(), host="127.0.0.1", port=port, log_level="warning")


def _ingress(cls: type, name: str) -> Any:
    return serve.deployment(
        serve.ingress()(cls),
        name=name,
        max_ongoing_requests=_ROOM,
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_cpus": 1, "runtime_env": _runtime_env()},
    )


def _runtime_env() -> dict[str, Any]:
    return {"env_vars": _python_path()}


def _python_path() -> dict[str, str]:
    return {"PYTHONPATH": capture_systems.python_path()}
