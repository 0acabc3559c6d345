"""Of several teachers, one whose engine dies, or that is lost, closes the way to no other. No
engine, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from journeyman.cascade.answering import Cascade
from journeyman.cascade.refusals import TeacherAway, TeacherUnavailable
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels
from serve import asking
from serve.asking import TeacherByHandle
from serve.routing import ByLoad
from serve.teacher import Unavailable
from tests.journeyman.cascade.test_answering import POLICY, Student

RESTARTING = "the teacher's engine died and is starting again"


def labels(texts: Sequence[str]) -> list[ClassLabels]:
    no = np.log(np.array([0.7, 0.3], np.float32))
    return [
        ClassLabels(class_logprobs=no, label_mass=None, n_prompt_tokens=1, n_output_tokens=1)
        for _ in texts
    ]


class Teachers:
    """Of one deployment; the sick ones have the least to do, so that they are asked first."""

    def __init__(self, *names: str) -> None:
        self.here = list(names)
        self.restarting: set[str] = set()
        self.asked: list[str] = []
        self.inside: dict[str, list[asyncio.Future[Any]]] = {name: [] for name in names}
        self.slow = False
        self.label = SimpleNamespace(remote=self._label)
        self.unready = SimpleNamespace(remote=self._unready)

    def _chosen(self, avoid: Sequence[str]) -> str:
        able = [name for name in self.here if name not in avoid] or self.here
        name = min(able, key=lambda one: (one not in self.restarting, len(self.inside[one])))
        self.asked.append(name)
        return name

    def _state(self, name: str) -> Unavailable | None:
        return Unavailable(reason=RESTARTING, replica=name) if name in self.restarting else None

    def _label(self, texts: list[str], avoid: Sequence[str] = ()) -> Any:
        name = self._chosen(avoid)
        said: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if cannot := self._state(name):
            said.set_result(cannot)
        elif self.slow:
            self.inside[name].append(said)
        else:
            said.set_result(labels(texts))
        return said

    def _unready(self, avoid: Sequence[str] = ()) -> Any:
        said: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.here:  # else it waits for one
            said.set_result(self._state(self._chosen(avoid)))
        return said

    def broadcast(self, method: str) -> Any:
        async def results_async(timeout_s: float, return_exceptions: bool) -> list[Any]:
            if not self.here:
                raise DeploymentUnavailableError(SimpleNamespace())  # type: ignore[arg-type]
            return [self._state(name) for name in self.here]

        return SimpleNamespace(results_async=results_async)

    def engine_dies(self, name: str) -> None:
        self.restarting.add(name)
        for said in self.inside.pop(name):
            said.set_result(Unavailable(reason=RESTARTING, replica=name, begun=True))
        self.inside[name] = []

    def is_lost(self, name: str) -> None:
        self.here.remove(name)
        for said in self.inside.pop(name):
            error = ActorDiedError()
            error.actor_id = name
            said.set_exception(error)


def by_handle(teachers: Teachers) -> TeacherByHandle:
    teacher = TeacherByHandle(teachers)  # type: ignore[arg-type]
    teacher.unready = None
    return teacher


def cascade(teacher: TeacherByHandle) -> Cascade:
    return Cascade(POLICY, Student(), teacher, Settings())


def test_a_replica_that_starts_again_is_asked_once_and_others_answer():
    async def scenario() -> None:
        teachers = Teachers("a", "b", "c")
        teachers.restarting = {"a", "b"}
        teacher = by_handle(teachers)
        for _ in range(20):
            assert len(await teacher.labels(["x"])) == 1
            await teacher._probe()
            assert teacher.unready is None
        assert teachers.asked.count("a") == teachers.asked.count("b") == 1

    asyncio.run(scenario())


def test_a_replica_that_was_left_alone_is_asked_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
):
    async def scenario() -> None:
        teachers = Teachers("a", "b")
        teachers.restarting = {"a"}
        teacher = by_handle(teachers)
        await teacher.labels(["x"])
        teachers.restarting = set()
        teachers.asked.clear()
        await teacher.labels(["x"])
        assert teachers.asked == ["b"]
        await asyncio.sleep(0.06)
        await teacher.labels(["x"])
        assert teachers.asked == ["b", "a"]

    monkeypatch.setattr(asking, "_AVOIDED_S", 0.05)
    asyncio.run(scenario())


@pytest.mark.parametrize("names", ["a", "abc"])
def test_only_where_all_start_again_the_teacher_is_away(names: str):
    async def scenario() -> None:
        teachers = Teachers(*names)
        teachers.restarting = set(names)
        teacher = by_handle(teachers)
        with pytest.raises(TeacherUnavailable, match="starting again") as refused:
            await teacher.labels(["x"])
        assert refused.value.retry_after_s and not isinstance(refused.value, TeacherAway)
        n_asked = len(teachers.asked)
        assert n_asked == len(names) + 1
        with pytest.raises(TeacherAway, match="starting again"):
            await teacher.labels(["x"])
        assert len(teachers.asked) == n_asked  # nobody, since all have said so
        await teacher._probe()
        assert teacher.unready == RESTARTING
        teachers.restarting.remove("a")
        await teacher._probe()
        assert teacher.unready is None
        assert len(await teacher.labels(["x"])) == 1

    asyncio.run(scenario())


def test_no_call_is_handed_on_without_end():
    async def scenario() -> None:
        names = [f"replica {i}" for i in range(100)]
        teachers = Teachers(*names)
        teachers.restarting = set(names[1:])
        teacher = by_handle(teachers)
        with pytest.raises(TeacherUnavailable):
            await teacher.labels(["x"])
        assert len(teachers.asked) == asking._MOST_ASKED
        assert teacher.unready is None  # not all have been asked

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["engine_dies", "is_lost"])
def test_what_was_in_a_replica_that_failed_ends_as_one_failure_and_the_others_go_on(how: str):
    """And is not tried on the others, which it might end, too."""

    async def scenario() -> None:
        teachers = Teachers("a", "b")
        teachers.slow = True
        teacher = by_handle(teachers)
        asked = cascade(teacher)
        requests = [asyncio.create_task(asked.answer(["hm"])) for _ in range(40)]
        await asyncio.sleep(0.01)
        in_b = teachers.inside["b"]
        assert len(teachers.inside["a"]) == len(in_b) == 20
        n_asked = len(teachers.asked)
        getattr(teachers, how)("a")
        ended, _ = await asyncio.wait(requests, timeout=0.1)
        assert len(ended) == 20
        assert all(isinstance(one.exception(), TeacherUnavailable) for one in ended)
        assert len(teachers.asked) == n_asked
        assert asked.breaker.is_closed and teacher.unready is None
        teachers.slow = False
        assert (await asked.answer(["hm"])).decisions[0].answered_by == "teacher"
        for said in in_b:
            said.set_result(labels(["hm"]))
        answers = await asyncio.gather(*(one for one in requests if one not in ended))
        assert {a.decisions[0].answered_by for a in answers} == {"teacher"}

    asyncio.run(scenario())


def test_where_the_only_replica_is_lost_the_next_request_is_told_so_at_once():
    async def scenario() -> None:
        teachers = Teachers("a")
        teachers.slow = True
        teacher = by_handle(teachers)
        request = asyncio.create_task(teacher.labels(["x"]))
        await asyncio.sleep(0)
        teachers.is_lost("a")
        gone = "replica is gone and another is starting"
        with pytest.raises(TeacherUnavailable, match=gone):
            await request
        async with asyncio.timeout(0.5):
            with pytest.raises(TeacherAway, match=gone):
                await teacher.labels(["x"])

    asyncio.run(scenario())


def test_a_request_is_routed_to_none_that_it_is_to_avoid_while_there_is_another():
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"]
    router = object.__new__(ByLoad)

    def chosen(*avoid: str) -> set[str]:
        request: Any = SimpleNamespace(
            args=[["x"]], kwargs={"avoid": list(avoid)}, routing_context=SimpleNamespace()
        )
        draws = [asyncio.run(router.choose_replicas(replicas, request)) for _ in range(50)]  # type: ignore[arg-type]
        return {one.replica_id.unique_id for ranks in draws for rank in ranks for one in rank}

    assert chosen() == {"a", "b", "c"}
    assert chosen("b") == {"a", "c"} and chosen("a", "b", "gone") == {"c"}
    assert chosen("a", "b", "c") == {"a", "b", "c"}
