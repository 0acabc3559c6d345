"""A replica that writes: what is heard of it, and what becomes of work nobody waits for. No engine,
no Ray."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from journeyman.cascade.answering import Cascade, Unlabeled
from journeyman.cascade.policy import Written
from journeyman.cascade.refusals import DeadlinePassed, TeacherAway, TeacherUnavailable
from journeyman.errors import ClusterError, ModelError
from journeyman.recipe import Classes, Generate
from journeyman.teacher.answers import ClassLabels, ContextOverflow, GeneratedLabels, Recorded
from journeyman.teacher.engine import EngineDied
from journeyman.teacher.progress import Begun, Spent, hearing, priority, spending
from serve import asking, teacher
from serve.accounts import Account, account
from serve.asking import TeacherByHandle
from serve.growth import Whole
from serve.students import Rule
from serve.teacher import Teacher, Unavailable
from serve.writers import Writer
from tests.serve.test_writers import ASKED, loaded, until


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


AUDIT = Account(ingress="i", bundle="b", key=None, is_audit=True)
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
        all_special_ids=[0],
        decode=lambda ids, skip_special_tokens=False: "".join(
            "_abcde"[i] for i in ids if i or not skip_special_tokens
        ),
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


def test_special_tokens_within_an_answer_are_in_its_tokens_as_in_its_text(
    monkeypatch: pytest.MonkeyPatch,
):
    ids = np.array([1, 0, 2, 0])

    async def run(*_: Any) -> GeneratedLabels:
        recorded = Recorded(token_ids=ids[:, None], logprobs=np.full((4, 1), -0.5, np.float32))
        return GeneratedLabels(
            output="ab", token_ids=ids, output_logprob=None, recorded=recorded, n_prompt_tokens=2,
            n_output_tokens=4, finish_reason="stop",
        )  # fmt: skip

    async def scenario() -> Any:
        writing = replica(monkeypatch, run, ASKED)
        [said] = await writing.label(["x"])  # type: ignore[misc]
        await writing.close()
        return said

    said = asyncio.run(scenario())
    assert (said.text, said.tokens) == ("ab", ("a", "", "b"))
    assert said.logprobs == pytest.approx([-0.5] * 4, abs=0.01)  # the score takes all


@pytest.mark.parametrize(
    "error", [ModelError("no room"), ClusterError("no node is free"), KeyError("of vLLM's own")]
)
def test_a_teacher_whose_engine_does_not_start_again_is_replaced_by_serve_unless_it_does_later(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    class Broken(Engine):
        async def start(self) -> None:
            raise error

    async def never(*_: Any) -> None: ...

    async def scenario() -> None:
        monkeypatch.setattr(teacher, "_WATCH_INTERVAL_S", 0.01)
        sick = replica(monkeypatch, never, ASKED)
        await sick.check_health()
        well, sick._engine = sick._engine, Broken()  # type: ignore[assignment]
        sick._engine.alive = False  # type: ignore[misc]
        await until(lambda: sick._failure is not None)
        with pytest.raises(RuntimeError, match=str(error)):
            await sick.check_health()
        cannot = await sick.unready()
        assert cannot and str(error) in cannot.reason
        sick._engine = well
        await sick.check_health()
        assert await sick.unready() is None
        await sick.close()

    asyncio.run(scenario())


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
def test_what_was_done_for_a_client_that_left_or_an_audit_that_took_too_long_is_told_apart(
    heard: bool, monkeypatch: pytest.MonkeyPatch
):
    """From the engine that counts, over the replica's account, to the ingress that asked."""
    monkeypatch.setattr(asking, "_COME_EVERY_S", 0.01)
    monkeypatch.setattr(asking, "_HEARD_WITHIN_S", 0.1)
    whose, nobodys = Account(ingress="i", bundle="b", key="k"), AUDIT
    bills: list[tuple[Account, Spent]] = []
    working: list[Spent] = []
    priorities: list[int] = []

    async def run(*_: Any) -> None:
        spent = spending.get()
        assert spent
        priorities.append(priority.get())
        spent.add(Spent(n_prompt_tokens=7, n_output_tokens=3))
        working.append(spent)
        await asyncio.Event().wait()

    async def scenario() -> None:
        writing = replica(monkeypatch, run, ASKED)
        teacher = TeacherByHandle(InProcess(writing), bill=lambda a, s: bills.append((a, s)))  # type: ignore[arg-type]
        teacher.unready = None
        account.set(whose)
        hear = (lambda _: None) if heard else None
        call = asyncio.create_task(teacher.labels(["x"], hear))
        context = contextvars.copy_context()
        context.run(account.set, nobodys)
        audit = asyncio.Task(teacher.labels(["x"]), context=context)
        await until(lambda: len(working) == 2)
        call.cancel()
        audit.cancel()
        await until(lambda: len(bills) == 2)
        await asyncio.sleep(0.15)
        await writing.close()

    asyncio.run(scenario())
    spent = Spent(n_prompt_tokens=7, n_output_tokens=3)
    assert len(bills) == 2 and dict(bills) == {whose: spent, nobodys: spent}
    assert sorted(priorities) == [0, 1], "the audit can wait"


def test_what_an_audit_takes_of_the_teacher_is_told_once_and_a_requests_by_its_answer_alone():
    bills: list[tuple[Account, Spent]] = []

    async def scenario() -> None:
        teacher = TeacherByHandle(Handle(UNSURE), bill=lambda a, s: bills.append((a, s)))  # type: ignore[arg-type]
        teacher.unready = None
        account.set(Account(ingress="i", bundle="b", key="k"))
        await teacher.labels(["x"])
        account.set(AUDIT)
        await teacher.labels(["x", "y"])

    asyncio.run(scenario())
    assert bills == [(AUDIT, Spent(n_prompt_tokens=2, n_output_tokens=2))]


def test_audits_keep_no_teacher_awake_that_may_sleep(monkeypatch: pytest.MonkeyPatch):
    """It rests, for them, after a while without a request; one that may not sleep never does."""

    async def scenario(may_sleep: bool) -> list[bool]:
        teacher = TeacherByHandle(Handle(UNSURE), may_sleep)  # type: ignore[arg-type]
        teacher.unready = None
        rested = [teacher.rests]
        for n_running, whose, after_s in (
            (1, AUDIT, 0),
            (1, None, 0),
            (1, AUDIT, 61),
            (0, None, 0),
        ):
            teacher.count(1)
            account.set(whose)
            await teacher.labels(["x"])
            teacher.count(n_running)
            now = time.monotonic()
            with monkeypatch.context() as later:
                later.setattr("time.monotonic", lambda at=now + after_s: at)
                rested.append(teacher.rests)
        return rested

    assert asyncio.run(scenario(True)) == [True, True, False, True, True]
    assert not any(asyncio.run(scenario(False)))


@pytest.mark.parametrize("begun", [False, True])
def test_a_teacher_says_whether_it_had_the_texts_when_it_could_not_answer(begun: bool):
    async def scenario() -> bool:
        async def answer(*_: Any, **__: Any) -> Unavailable:
            return Unavailable(reason="starts again", replica="a", begun=begun)

        handle = SimpleNamespace(label=SimpleNamespace(remote=answer))
        teacher = TeacherByHandle(handle)  # type: ignore[arg-type]
        teacher.unready = None
        with pytest.raises(TeacherUnavailable) as refused:
            await teacher.labels(["x"])
        return refused.value.had_texts

    assert asyncio.run(scenario()) == begun


ASKED_OF_JUDGE = Classes(classes={"same": "Yes", "different": "No"}, prompt="{{ first }}")


def test_a_judge_gives_each_pair_its_verdict_or_none_and_says_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
):
    """Over the handle of the teacher, in its engine's loop."""
    asked: list[Any] = []
    bills: list[tuple[Account, Spent]] = []

    async def run(row: dict[str, str], *_: Any) -> ClassLabels:
        if row["first"] == "long":
            raise ContextOverflow(9, 8)
        return ClassLabels(class_logprobs=np.log([0.9, 0.1]), label_mass=1.0, n_prompt_tokens=1,
                           n_output_tokens=1)  # fmt: skip

    async def scenario() -> list[Any]:
        writing = replica(monkeypatch, run, ASKED)
        task = SimpleNamespace(run=run)
        monkeypatch.setattr(teacher.tasks, "local", lambda of, _: asked.append(of) or task)
        judge = TeacherByHandle(InProcess(writing), bill=lambda a, s: bills.append((a, s)))  # type: ignore[arg-type]
        account.set(AUDIT)
        with pytest.raises(TeacherAway, match="starting"):
            await judge.judged([{"first": "a"}], ASKED_OF_JUDGE)
        judge.unready = None
        said = await judge.judged([{"first": "a"}, {"first": "long"}], ASKED_OF_JUDGE)
        await writing.close()
        return [*said]

    verdict, none = asyncio.run(scenario())
    assert verdict.class_logprobs == pytest.approx(np.log([0.9, 0.1]))
    assert isinstance(none, Unlabeled) and "9 tokens" in none.reason
    assert asked == [ASKED_OF_JUDGE]
    assert bills == [(AUDIT, Spent(n_prompt_tokens=1, n_output_tokens=1))]


def test_a_judge_whose_engine_has_died_is_away(monkeypatch: pytest.MonkeyPatch):
    async def run(*_: Any) -> None:
        raise EngineDied

    async def scenario() -> None:
        writing = replica(monkeypatch, run, ASKED)
        judge = TeacherByHandle(InProcess(writing))  # type: ignore[arg-type]
        judge.unready = None
        with pytest.raises(TeacherUnavailable, match="died"):
            await judge.judged([{"first": "a"}], ASKED_OF_JUDGE)
        await writing.close()

    asyncio.run(scenario())


class InProcess:
    """A handle to one replica in this process; cancels as Serve does."""

    def __init__(self, replica: Teacher) -> None:
        self._replica = replica
        self.label = SimpleNamespace(remote=lambda *a: Call(replica.label(*a)))
        self.judge = SimpleNamespace(remote=lambda **k: Call(replica.judge(**k)))
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
