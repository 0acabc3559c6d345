"""Students that write, several in one deployment, and what becomes of work nobody waits for. No
engine, no Ray."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from journeyman import recipe
from journeyman.cascade.answering import Cascade
from journeyman.cascade.policy import Written
from journeyman.cascade.refusals import DeadlinePassed
from journeyman.errors import BundleMismatch, ModelError
from journeyman.models import Model
from journeyman.recipe import Generate
from journeyman.teacher.answers import GeneratedLabels, RationaleLabels, Unparsable
from journeyman.teacher.progress import Begun, Spent, hearing, spending
from serve import asking, loading, teacher, writers
from serve.accounts import Account, account
from serve.asking import TeacherByHandle
from serve.growth import Whole
from serve.loading import Loaded
from serve.students import Rule
from serve.teacher import Teacher, Unavailable
from serve.writers import Standing, Student, Writer
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
    return Student(loaded("a"), engines.start, lambda: loaded(current) if current else None)


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
        monkeypatch.setattr(writers, "_KEPT_S", 0.05)
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
        assert await student.unready(key("b")) == why
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
        monkeypatch.setattr(writers, "_KEPT_S", 0.0)
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
    monkeypatch.setattr(writers, "_LOOK_EVERY_S", 0.0)
    replicas = Replicas([STARTING, STARTING], [], [READY, STARTING], [READY, READY], [STARTING])
    asyncio.run(writers.started(replicas, loaded("b")))  # type: ignore[arg-type]
    assert replicas.turns == [[STARTING]]
    failing = Replicas([STARTING, STARTING], [READY, Standing(ready=False, failure="no room")])
    with pytest.raises(ModelError, match=r"does not start beside .*no room.*deploy it anew"):
        asyncio.run(writers.started(failing, loaded("b")))  # type: ignore[arg-type]
    never = loaded("b", teacher={"model": "m", "start_timeout_s": 0.01})
    monkeypatch.setattr(writers, "_OTHER_WORK_S", 0.0)
    with pytest.raises(ModelError, match="not started within"):
        asyncio.run(writers.started(Replicas(*[[STARTING]] * 10**5), never))  # type: ignore[arg-type]


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


class Handle:
    """A deployment that answers nobody, or only what it is sure of; notes what is cancelled."""

    def __init__(self, says: Written | None = None) -> None:
        self.says, self.asked, self.cancelled = says, 0, 0
        self.label = SimpleNamespace(remote=self._remote)

    def _remote(self, texts: list[str], *_: str) -> Any:
        self.asked += 1
        handle = self

        class Response:
            def __await__(self) -> Any:
                return handle._answer(texts).__await__()

            def cancel(self) -> None:
                handle.cancelled += 1

        return Response()

    async def _answer(self, texts: list[str]) -> list[Written]:
        if self.says is None:
            await asyncio.Event().wait()
        return [self.says for _ in texts if self.says]


UNSURE = Written(text="perhaps", tokens=(), logprobs=np.array([-9.0]), finish_reason="stop",
                 n_prompt_tokens=1, n_output_tokens=1)  # fmt: skip


def cascade(student: Handle, teacher: Handle, timeout_s: float) -> Cascade:
    of = loaded("a", cascade={"request_timeout_s": timeout_s})
    rule = Rule(of)
    writer = Writer(student, of, rule, lambda: True)  # type: ignore[arg-type]
    asked = TeacherByHandle(teacher)  # type: ignore[arg-type]
    writer._engine.unready = asked.unready = None
    return Cascade(rule.policy, writer, asked, of.recipe.cascade)


@pytest.mark.parametrize("speaks", [None, UNSURE], ids=["student", "teacher"])
@pytest.mark.parametrize("why", ["deadline", "client"])
def test_what_nobody_waits_for_is_cancelled_at_the_model_that_writes_it(
    speaks: Written | None, why: str
):
    student, asked = Handle(speaks), Handle()

    async def scenario() -> None:
        answering = cascade(student, asked, 0.05 if why == "deadline" else 60)
        request = asyncio.create_task(answering.answer(["x"]))
        if why == "deadline":
            with pytest.raises(DeadlinePassed):
                await request
        else:
            await until(lambda: (asked if speaks else student).asked == 1)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    asyncio.run(scenario())
    assert (student.asked, student.cancelled) == (1, 0 if speaks else 1)
    assert (asked.asked, asked.cancelled) == ((1, 1) if speaks else (0, 0))


class Engine:
    """One that only its tasks ask."""

    alive = True
    tokenizer = SimpleNamespace(
        all_special_ids=[0], decode=lambda ids, **_: "".join("_abcde"[i] for i in ids)
    )

    def __init__(self, *_: Any, **__: Any) -> None: ...
    async def start(self) -> None: ...
    def close(self) -> None: ...


def replica(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], asked: Generate) -> Teacher:
    """A teacher's, each of whose rows is answered by ``run`` in the engine's loop."""
    monkeypatch.setattr(teacher, "Engine", Engine)
    monkeypatch.setattr(teacher.models, "here", lambda model, _: model)
    monkeypatch.setattr(teacher.tasks, "local", lambda *_: SimpleNamespace(run=run))
    of = loaded("a")
    model = replace(of.teacher, vocab_size=10)
    return Teacher(of.recipe.teacher, asked, ("text",), model)


def test_a_teacher_is_heard_as_it_writes_and_at_last_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    """By the engine's own text, which may hold back what its tokens say."""

    async def run(*_: Any) -> GeneratedLabels:
        hear = hearing.get()
        assert hear
        for text, ids in (("", [1]), ("a", [1, 2]), ("ab", [1, 2, 3])):
            hear(Begun(text=text, token_ids=ids))
        return GeneratedLabels(
            output="abcd", token_ids=np.array([1, 2, 3, 4, 0]), output_logprob=None,
            recorded=None, n_prompt_tokens=2, n_output_tokens=5, finish_reason="stop",
        )  # fmt: skip

    async def scenario() -> list[Any]:
        speaking = replica(monkeypatch, run, ASKED.model_copy(update={"stop": ("xy",)}))
        said = [part async for part in speaking.speak("x")]
        await speaking.close()
        return said

    *parts, whole = asyncio.run(scenario())
    so_far = Whole()
    assert [(w.text, w.tokens) for w in map(so_far.add, parts)] == [
        ("", ("a",)), ("a", ("a", "b")), ("ab", ("a", "b", "c")),
    ]  # fmt: skip
    assert (whole.text, whole.n_output_tokens) == ("abcd", 5)


@pytest.mark.parametrize("heard", [False, True])
def test_a_call_that_is_cancelled_ends_in_the_engines_own_loop(
    heard: bool, monkeypatch: pytest.MonkeyPatch
):
    ended = []

    async def run(*_: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def scenario() -> None:
        writing = replica(monkeypatch, run, ASKED)
        call = asyncio.create_task(
            anext(writing.speak("x")) if heard else writing.label(["x"])  # type: ignore[arg-type]
        )
        await asyncio.sleep(0.05)
        call.cancel()
        await until(lambda: ended == ["cancelled"])
        await writing.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("heard", [False, True])
def test_what_was_done_for_a_client_that_left_is_billed_to_its_key(
    heard: bool, monkeypatch: pytest.MonkeyPatch
):
    """From the engine that counts, over the replica's account, to the ingress that asked."""
    monkeypatch.setattr(asking, "_COME_EVERY_S", 0.01)
    monkeypatch.setattr(asking, "_HEARD_WITHIN_S", 0.1)
    whose = Account(ingress="i", bundle="b", key="k")
    bills: list[tuple[Account, Spent]] = []

    async def run(*_: Any) -> None:
        spent = spending.get()
        assert spent
        spent.add(Spent(n_prompt_tokens=7, n_output_tokens=3))
        await asyncio.Event().wait()

    async def scenario() -> None:
        writing = replica(monkeypatch, run, ASKED)
        teacher = TeacherByHandle(InProcess(writing), bill=lambda a, s: bills.append((a, s)))  # type: ignore[arg-type]
        teacher.unready = None
        account.set(whose)
        hear = (lambda _: None) if heard else None
        call = asyncio.create_task(teacher.labels(["x"], hear))
        audit = asyncio.Task(teacher.labels(["x"]), context=contextvars.Context())
        await asyncio.sleep(0.05)
        call.cancel()
        audit.cancel()  # nobody pays for it
        await until(lambda: bool(bills))
        await asyncio.sleep(0.15)
        await writing.close()

    asyncio.run(scenario())
    assert bills == [(whose, Spent(n_prompt_tokens=7, n_output_tokens=3))]


class InProcess:
    """A handle to one replica in this process; cancels as Serve does."""

    def __init__(self, replica: Teacher) -> None:
        self._replica = replica
        self.label = SimpleNamespace(remote=lambda *a: Call(replica.label(*a)))
        self.speak = SimpleNamespace(remote=lambda *a: Call(anext(replica.speak(*a))))

    def options(self, stream: bool) -> InProcess:
        return self

    def broadcast(self, method: str, *arguments: Any) -> Any:
        async def results_async(timeout_s: float) -> list[Any]:
            return [await getattr(self._replica, method)(*arguments)]

        return SimpleNamespace(results_async=results_async)


class Call:
    def __init__(self, work: Any) -> None:
        self._task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()

    async def __aiter__(self) -> Any:
        yield await asyncio.shield(self._task)

    def cancel(self) -> None:
        self._task.cancel()


def sampled(student: str) -> Loaded:
    """The same, where its confidence takes two samples."""
    plain = loaded(student)
    changes = {"score": "self_consistency", "samples": {"n": 2, "temperature": 0.7}}
    bundle = type(plain.bundle).model_validate(plain.bundle.model_dump() | changes)
    return replace(plain, bundle=bundle)


def test_a_student_draws_the_samples_of_its_certificate_beside_its_answer(
    monkeypatch: pytest.MonkeyPatch,
):
    """Where it wrote nothing in any of them it has none, as there."""
    of, asked = sampled("a"), []
    monkeypatch.setattr(writers.loading, "student_here", lambda _: Path("a"))
    monkeypatch.setattr(writers.models, "resolve", lambda _: replace(of.student, vocab_size=10))

    async def answer(row: dict[str, str], seed: int = 0) -> GeneratedLabels:
        return GeneratedLabels(
            output="ab", token_ids=np.array([1, 2]), output_logprob=None, recorded=None,
            n_prompt_tokens=2, n_output_tokens=2, finish_reason="stop",
        )  # fmt: skip

    async def drawn(row: dict[str, str], seed: int = 0) -> RationaleLabels:
        if row["text"] == "silent":
            raise Unparsable("none of 2 samples has an answer")
        return RationaleLabels(
            reasonings=["ab", "cd"], answers=["ab", "cd"], answer="ab", reasoning="ab",
            agreement=0.5, n_unparsed=0, class_logprobs=None, label_mass=None, n_prompt_tokens=2,
            n_output_tokens=4,
        )  # fmt: skip

    def local(labels: Any, _: Any) -> Any:
        asked.append(labels)
        return SimpleNamespace(run=answer if labels.kind == "generate" else drawn)

    async def scenario() -> list[Any]:
        monkeypatch.setattr(teacher, "Engine", Engine)
        monkeypatch.setattr(teacher.models, "here", lambda model, _: model)
        monkeypatch.setattr(teacher.tasks, "local", local)
        student = writers.StudentEngine(of)
        said = await student.label(["x", "silent"])
        await student.close()
        return said  # type: ignore[return-value]

    said = asyncio.run(scenario())
    assert [(one.text, one.samples) for one in said] == [("ab", ("ab", "cd")), ("ab", ())]
    greedy, samples = asked
    assert (greedy.temperature, samples.temperature, samples.samples) == (0.0, 0.7, 2)
    assert samples.prompt == greedy.prompt


def test_a_student_that_is_sampled_is_another_than_the_same_one_that_is_not():
    """A bundle that is swapped in is answered by the draws that it was certified with."""
    assert loading.student_key(sampled("a").bundle) != key("a")
