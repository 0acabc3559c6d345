"""Students that write, several in one deployment. No engine, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from journeyman import recipe
from journeyman.cascade.policy import Decision, Escalation, Written
from journeyman.errors import BundleMismatch, ModelError
from journeyman.models import Model
from journeyman.recipe import Generate
from serve import apart, loading, student_replicas, writers
from serve.apart import Standing
from serve.ingress import Ingress
from serve.loading import Loaded
from serve.student_replicas import Student
from serve.students import Rule
from serve.teacher import Unavailable
from tests.serve import tiny

ASKED = Generate(kind="generate", prompt="{{ text }}", max_tokens=8)


def loaded(student: str, **settings: Any) -> Loaded:
    """Of a bundle whose student has these weights."""

    def model(name: str) -> Model:
        return Model(reference=name, path=Path(name), weights_digest=name, tokenizer_digest="t",
                     size_bytes=1)  # fmt: skip

    values = {
        "name": "a",
        "corpus": {"sources": ["a.jsonl"]},
        "teacher": {"model": "m"},
        "student": {"model": "s", "kind": "causal"},
        "labels": ASKED.model_dump(),
    }
    return Loaded(
        bundle=tiny.a_written_bundle(model(student), model("teacher"), ASKED, threshold=-1.0),
        recipe=recipe.parse(values | settings),
        student=model(student),
        teacher=model("teacher"),
        where=student,
    )


def key(student: str) -> str:
    return loading.student_key(loaded(student).bundle)


def wrote(text: str) -> Written:
    return Written(text=text, tokens=(), logprobs=np.array([-0.5]), finish_reason="stop",
                   n_prompt_tokens=1, n_output_tokens=1)  # fmt: skip


class Engines:
    """Stand-ins, which say whose they are."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.closed: list[str] = []
        self.dead: set[str] = set()

    def start(self, of: Loaded) -> Any:
        name = of.where
        self.started.append(name)
        if name == "broken":
            raise ModelError("broken: no room")

        async def label(texts: Sequence[str]) -> list[Written]:
            return [wrote(f"{name} says {text}") for text in texts]

        async def unready() -> None:
            return None

        async def close() -> None:
            self.closed.append(name)

        async def check_health() -> None:
            if name in self.dead:
                raise RuntimeError(f"{name}: its engine does not start again")

        return SimpleNamespace(
            label=label, unready=unready, close=close, check_health=check_health, stop=lambda: None
        )


def replica_of_students(engines: Engines, current: str | None = None) -> Student:
    """Of an application whose own bundle is a's."""
    return Student(loaded("a"), engines.start, lambda _: loaded(current) if current else None)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


def test_another_student_starts_beside_the_one_that_answers_which_ends_when_forgotten(
    monkeypatch: pytest.MonkeyPatch,
):
    engines = Engines()

    async def scenario() -> None:
        student = replica_of_students(engines)
        assert await student.label(["x"], key("b")) == Unavailable(reason="the student is starting")
        assert await student.keep(loaded("b"), answers=False) == Standing(ready=False)
        assert await student.keep(loaded("b"), answers=False) == Standing(
            ready=False
        )  # on its way already
        assert await student.unready(key("b")) and not await student.unready(key("a"))
        await until(lambda: key("b") in student._engines)
        assert await student.keep(loaded("b"), answers=False) == Standing(ready=True)
        for name in "ab":
            [said] = await student.label(["x"], key(name))  # type: ignore[misc]
            assert said.text == f"{name} says x"
        assert engines.started == ["a", "b"]
        monkeypatch.setattr(student_replicas, "_KEPT_S", 0.05)
        await asyncio.sleep(0.06)
        await student.keep(loaded("b"), answers=False)
        await until(lambda: engines.closed == ["a"])
        assert await student.unready(key("a")) and not await student.unready(key("b"))

    asyncio.run(scenario())


def test_a_replica_that_starts_later_starts_the_student_that_answers_by_then():
    engines = Engines()
    student = replica_of_students(engines, current="b")
    assert engines.started == ["b"]
    assert asyncio.run(student.unready(key("b"))) is None
    replica_of_students(engines)  # where nobody says so, the application's own
    assert engines.started == ["b", "a"]


def test_an_ingress_that_is_being_replaced_does_not_say_what_its_successors_students_start():
    """Deployed anew with c's bundle, where there is no room beside a's."""
    a, b = loaded("a"), loaded("b", name="b")
    ingress: Any = SimpleNamespace(
        _spec=SimpleNamespace(loaded=a),
        _live=SimpleNamespace(bundle=b.bundle),
        _loaded={of.bundle.bundle_id: of for of in (a, b)},
    )
    own = {name: loaded(name).bundle.bundle_id for name in "ac"}
    assert asyncio.run(Ingress.answering_now(ingress, own["a"])) is b
    assert asyncio.run(Ingress.answering_now(ingress, own["c"])) is None


def test_only_the_student_that_answers_takes_its_replica_along_when_it_dies():
    engines = Engines()

    async def scenario() -> None:
        student = replica_of_students(engines)
        await student.keep(loaded("b"), answers=False)
        await until(lambda: key("b") in student._engines)
        await student.check_health()
        engines.dead = {"b"}
        await student.check_health()
        await until(lambda: engines.closed == ["b"])
        why = "b: its engine does not start again"
        assert await student.unready(key("b")) == Unavailable(reason=why)
        told = await student.keep(loaded("b"), answers=False)
        assert told == Standing(ready=False, failure=why)
        [said] = await student.label(["x"], key("a"))  # type: ignore[misc]
        assert said.text == "a says x"
        engines.dead = {"a"}
        with pytest.raises(RuntimeError, match="a: its engine"):
            await student.check_health()

    asyncio.run(scenario())


def test_a_student_that_answers_in_place_of_another_takes_its_replica_along_too():
    engines = Engines()

    async def scenario() -> None:
        student = replica_of_students(engines)
        await student.keep(loaded("b"), answers=False)
        await until(lambda: key("b") in student._engines)
        await student.keep(loaded("b"), answers=True)
        engines.dead = {"b"}
        with pytest.raises(RuntimeError, match="b: its engine"):
            await student.check_health()

    asyncio.run(scenario())


def test_a_student_that_does_not_start_leaves_the_other_and_may_be_tried_again_later(
    monkeypatch: pytest.MonkeyPatch,
):
    engines = Engines()

    async def scenario() -> None:
        student = replica_of_students(engines)
        await student.keep(loaded("broken"), answers=False)
        await until(lambda: not student._starting)
        told = await student.keep(loaded("broken"), answers=False)
        assert told == Standing(ready=False, failure="broken: no room")
        assert engines.started == ["a", "broken"] and not await student.unready(key("a"))
        monkeypatch.setattr(student_replicas, "_KEPT_S", 0.0)
        student._asked_at[key("a")] = float("inf")
        await student.keep(loaded("broken"), answers=False)
        await until(lambda: engines.started == ["a", "broken", "broken"])

    asyncio.run(scenario())


class Replicas:
    """A handle to some, whose ``keep`` says in turn what it is told to."""

    def __init__(self, *turns: list[Standing]) -> None:
        self.turns = list(turns)

    def broadcast(self, method: str, of: Loaded, answers: bool) -> Any:
        assert method == "keep" and not answers  # not before it is there

        async def results_async(timeout_s: float) -> list[Standing]:
            turn = self.turns.pop(0)
            if not turn:
                raise TimeoutError
            return turn

        return SimpleNamespace(results_async=results_async)


READY, STARTING = Standing(ready=True), Standing(ready=False)


def test_a_bundle_waits_for_its_student_in_every_replica(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(apart, "_LOOK_EVERY_S", 0.0)
    replicas = Replicas([STARTING, STARTING], [], [READY, STARTING], [READY, READY], [STARTING])
    asyncio.run(apart.started(replicas, loaded("b")))  # type: ignore[arg-type]
    assert replicas.turns == [[STARTING]]
    failing = Replicas([STARTING, STARTING], [READY, Standing(ready=False, failure="no room")])
    with pytest.raises(ModelError, match=r"does not start beside .*no room.*deploy it anew"):
        asyncio.run(apart.started(failing, loaded("b")))  # type: ignore[arg-type]
    never = loaded("b", teacher={"model": "m", "start_timeout_s": 0.01})
    monkeypatch.setattr(apart, "_OTHER_WORK_S", 0.0)
    with pytest.raises(ModelError, match="not started within"):
        asyncio.run(apart.started(Replicas(*[[STARTING]] * 10**5), never))  # type: ignore[arg-type]


def test_two_students_that_a_gpu_has_no_room_for_are_refused_before_one_is_started():
    on_gpu = loaded("a", cascade={"student_gpus": 1})
    with pytest.raises(BundleMismatch, match=r"add up to 1\.8.*0\.45"):
        loading.check_fits(loaded("b"), on_gpu)
    loading.check_fits(loaded("a"), on_gpu)  # another threshold, say
    half = {"teacher": {"model": "m", "gpu_memory_utilization": 0.45}}
    loading.check_fits(loaded("b", **half), loaded("a", cascade={"student_gpus": 1}, **half))
    other = Generate(kind="generate", prompt="Briefly: {{ text }}", max_tokens=8)
    unlike = loaded("b")
    bundle = tiny.a_written_bundle(unlike.student, unlike.teacher, other, threshold=-1.0)
    with pytest.raises(BundleMismatch, match=r"another teacher or prompt.*\(prompt_digest\)"):
        loading.check_fits(
            Loaded(bundle=bundle, recipe=unlike.recipe, student=unlike.student,
                   teacher=unlike.teacher, where="b"), on_gpu)  # fmt: skip


def test_a_text_longer_than_any_that_was_certified_is_the_teachers_though_the_student_wrote():
    of = loaded("a")
    of = replace(of, bundle=of.bundle.model_copy(update={"longest": 3}))

    async def scenario() -> None:
        writer = writers.Writer(SimpleNamespace(), of, Rule(of), lambda: True)  # type: ignore[arg-type]

        async def labels(texts: Sequence[str]) -> list[Written]:
            return [wrote(f"to {text}") for text in texts]

        writer._engine.labels = labels  # type: ignore[method-assign]
        short, long = await writer.submit(["who", "whom"])
        assert isinstance(short, Decision) and short.confidence == -0.5
        assert isinstance(long, Escalation) and long.student is not None
        assert (long.student.label, long.student.confidence) == ("to whom", None)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("teacher", "path"),
    [
        ({"dtype": "bfloat16"}, "teacher.dtype"),
        ({"engine_args": {"quantization": "fp8"}}, "teacher.engine_args.quantization"),
        ({"max_model_len": 64}, "teacher.max_model_len"),
    ],
)
def test_a_bundle_whose_teacher_runs_in_another_way_is_not_swapped_in(
    teacher: dict[str, Any], path: str
):
    """Labels of such a teacher would be another dataset, and the promise is about these."""
    labels = {"labels": ASKED.model_dump() | {"overflow": "truncate_left"}}
    runs = loaded("a", **labels)
    other = loaded("b", teacher={"model": "m"} | teacher, **labels)
    with pytest.raises(BundleMismatch, match=rf"another teacher or prompt.*\({path}\)"):
        loading.check_fits(other, runs)
    as_fast = {"price": {"per_replica_hour": 2}, "max_num_seqs": 8,
               "engine_args": {"enable_prefix_caching": True}}  # fmt: skip
    loading.check_fits(loaded("b", teacher={"model": "m"} | as_fast, **labels), runs)
