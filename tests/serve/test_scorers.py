"""Students that classify in a deployment of their own: they decide as they would in the ingress."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from journeyman.cascade.batcher import Batcher
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.refusals import StudentOverloaded, StudentUnavailable
from journeyman.errors import BundleMismatch, ModelError
from journeyman.student.models import Classifier
from serve import loading, student_replicas
from serve.loading import Loaded
from serve.scorers import Scored
from serve.student_replicas import Student
from serve.students import Encoders, Rule, readers
from tests.conftest import children
from tests.ray_head import until
from tests.serve import tiny
from tests.serve.asking import asking
from tests.serve.several import Several
from tests.serve.test_scaling import with_settings


class Handle:
    """Of a deployment in this process, with one replica."""

    def __init__(self, replica: Student) -> None:
        self.score, self.unready = self._method(replica.score), self._method(replica.unready)

    @staticmethod
    def _method(method: Any) -> Any:
        return SimpleNamespace(remote=lambda *a, **k: asyncio.ensure_future(method(*a, **k)))

    def broadcast(self, method: str, *_: object) -> Any:
        async def results_async(**_: object) -> list[Any]:
            return []

        return SimpleNamespace(results_async=results_async)


def apart(loaded: Loaded, **settings: object) -> Loaded:
    cascade = loaded.recipe.cascade.model_copy(update={"student_apart": True, **settings})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"cascade": cascade}))


async def here(loaded: Loaded, texts: Sequence[str]) -> list[Decision | Escalation]:
    student = Encoders(loaded, readers(loaded), Rule(loaded))
    student.start()
    try:
        return await student.submit(texts)
    finally:
        await student.close()


def as_values(decided: Sequence[Decision | Escalation]) -> list[tuple[Any, ...]]:
    found = []
    for one in decided:
        said = one if isinstance(one, Decision) else one.student
        assert said
        found.append((type(one), said.label, said.stage, pytest.approx(said.confidence, abs=1e-5)))
    return found


def test_it_decides_as_in_the_ingress(run: tiny.Run):
    loaded = apart(loading.load(run.bundle_dir))

    async def scenario() -> None:
        replica = Student(loaded, current=lambda _: None)
        student = Scored(Handle(replica), loaded, Rule(loaded), lambda: True, is_up=True)  # type: ignore[arg-type]
        decided = await student.submit(tiny.TEXTS)
        assert as_values(decided) == as_values(await here(loaded, tiny.TEXTS))
        assert sum(isinstance(one, Decision) for one in decided) == len(run.accepted)

    asyncio.run(scenario())


def test_of_several_each_is_asked_for_what_the_one_before_passes_on(
    run: tiny.Run, several: Several
):
    loaded = apart(loading.load(several.folder))
    alone = loading.load(run.bundle_dir)  # of the last one
    assert loading.student_key(loaded.bundle) != loading.student_key(alone.bundle)

    async def scenario() -> None:
        replica = Student(loaded, current=lambda _: None)
        student = Scored(Handle(replica), loaded, Rule(loaded), lambda: True, is_up=True)  # type: ignore[arg-type]
        decided = await student.submit(tiny.TEXTS)
        by = [one.stage - 1 if isinstance(one, Decision) else 2 for one in decided]  # type: ignore[operator]
        assert by == several.by
        assert as_values(decided) == as_values(await here(loaded, tiny.TEXTS))

    asyncio.run(scenario())


def test_texts_of_all_ingresses_share_its_batches(run: tiny.Run, monkeypatch: pytest.MonkeyPatch):
    loaded = apart(loading.load(run.bundle_dir), max_batch_size=64)
    sizes: list[int] = []
    logits = Classifier.logits

    def counted(self: Classifier, texts: Sequence[Any], *passes: int) -> np.ndarray:
        sizes.append(len(texts))
        return logits(self, texts, *passes)

    monkeypatch.setattr(Classifier, "logits", counted)

    async def scenario() -> None:
        handle = Handle(Student(loaded, current=lambda _: None))
        students = [
            Scored(handle, loaded, Rule(loaded), lambda: True, is_up=True)  # type: ignore[arg-type]
            for _ in range(4)
        ]
        await asyncio.gather(*(one.submit([text]) for one in students for text in tiny.TEXTS[:8]))

    asyncio.run(scenario())
    assert sum(sizes) == 32 and len(sizes) <= 2, sizes


def test_a_device_that_failed_takes_its_replica_along_and_no_text_into_an_error(run: tiny.Run):
    loaded = apart(loading.load(run.bundle_dir))

    async def scenario() -> None:
        replica = Student(loaded, current=lambda _: None)
        [scorer] = replica._engines.values()

        def broken(*_: object, **__: object) -> None:
            raise torch.AcceleratorError("an illegal memory access was encountered: secret", 700)

        for reader in scorer._readers:
            reader.classifier.model.forward = broken
        await replica.check_health()
        with pytest.raises(Exception, match="AcceleratorError") as raised:
            await replica.score(["secret"], loading.student_key(loaded.bundle), 0)
        assert "secret" not in str(raised.value)
        cannot = await replica.score(["x"], loading.student_key(loaded.bundle), 0)
        assert cannot.reason == "the student's device failed: AcceleratorError"  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="device failed"):
            await replica.check_health()
        student = Scored(Handle(replica), loaded, Rule(loaded), lambda: True, is_up=True)  # type: ignore[arg-type]
        with pytest.raises(StudentUnavailable):
            await student.submit(["x"])

    asyncio.run(scenario())


def test_where_its_queue_takes_too_long_further_texts_are_refused(
    run: tiny.Run, monkeypatch: pytest.MonkeyPatch
):
    loaded = apart(loading.load(run.bundle_dir), request_timeout_s=10.0)
    monkeypatch.setattr(Batcher, "wait_s", 5.5)

    async def scenario() -> None:
        replica = Student(loaded, current=lambda _: None)
        student = Scored(Handle(replica), loaded, Rule(loaded), lambda: True, is_up=True)  # type: ignore[arg-type]
        with pytest.raises(StudentOverloaded, match="about 6 s") as refused:
            await student.submit(["x"])
        assert refused.value.retry_after_s == 5.5
        monkeypatch.setattr(Batcher, "wait_s", 4.5)
        assert len(await student.submit(["x"])) == 1

    asyncio.run(scenario())


def test_a_student_that_is_closed_gives_its_memory_back(
    run: tiny.Run, several: Several, monkeypatch: pytest.MonkeyPatch
):
    """What Serve froze as the replica began is never collected."""
    monkeypatch.setattr(student_replicas, "_KEPT_S", 0.05)
    first, second = (apart(loading.load(one)) for one in (run.bundle_dir, several.folder))
    keys = [loading.student_key(one.bundle) for one in (first, second)]

    async def scenario() -> None:
        replica = Student(first, current=lambda _: None)
        await replica.score(["x"], keys[0], 0)
        [reader] = replica._engines[keys[0]]._readers
        while not (await replica.keep(second, answers=True)).ready:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await replica.keep(second, answers=True)
        assert [*replica._engines] == keys[1:]
        await asyncio.gather(*replica._closing)
        assert {one.device.type for one in reader.classifier.model.parameters()} == {"meta"}
        assert len(await replica.score(["x"], keys[1], 1)) == 1  # type: ignore[arg-type]

    asyncio.run(scenario())


def test_a_bundle_that_wants_replicas_of_its_own_is_not_swapped_in_where_there_are_none(
    run: tiny.Run,
):
    here = loading.load(run.bundle_dir)
    with pytest.raises(BundleMismatch, match=r"replicas of its own.*deploy it anew"):
        loading.check_fits(apart(here), here)
    loading.check_fits(here, apart(here))
    loading.check_fits(apart(here), apart(here))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_to_be_seen_is_told_and_not_done_without(run: tiny.Run):
    loaded = apart(loading.load(run.bundle_dir), student_gpus=1.0)
    with pytest.raises(ModelError, match=r"cascade\.student_gpus: torch .* sees no GPU here"):
        Student(loaded, current=lambda _: None)


def test_what_waits_for_a_replica_is_the_teachers_once_the_student_is_found_away(run: tiny.Run):
    loaded = apart(loading.load(run.bundle_dir))

    async def scenario() -> None:
        waiting: list[asyncio.Future[Any]] = []

        def remote(*_: object, **__: object) -> asyncio.Future[Any]:
            waiting.append(asyncio.get_running_loop().create_future())
            return waiting[-1]

        handle: Any = SimpleNamespace(score=SimpleNamespace(remote=remote))
        student = Scored(handle, loaded, Rule(loaded), lambda: True, is_up=True)
        asked = asyncio.create_task(student.submit(["x"]))
        await asyncio.sleep(0.05)
        student._engine.unready = "the student does not answer"  # as its probe finds
        with pytest.raises(StudentUnavailable):
            await asked
        await asyncio.sleep(0)
        assert [one.cancelled() for one in waiting] == [True]

    asyncio.run(scenario())


@pytest.fixture
def served(ray_cluster: None, run: tiny.Run, tmp_path: Path) -> Iterator[str]:
    from serve.running import running

    with running(with_settings(run, tmp_path, student_apart=True, student_cpus=0.5)) as url:
        yield url


@pytest.mark.slow  # starts an engine
@pytest.mark.timeout(400)
def test_a_student_apart_answers_and_while_its_replica_is_away_the_teacher_does(
    served: str, run: tiny.Run
):
    def replicas() -> list[psutil.Process]:
        return children("ServeReplica:cascade:Student")

    def by(texts: Sequence[str]) -> set[str]:
        body = {"input": list(texts)}
        answer = httpx.post(f"{served}/v1/classify", json=body, timeout=60).raise_for_status()
        return {one["answered_by"] for one in answer.json()["results"]}

    [replica] = replicas()
    assert (by(run.accepted), by(run.escalated)) == ({"student"}, {"teacher"})
    with asking(served, run.accepted[:2], 3) as asked:
        until(lambda: asked.answered_by["student"] > 20, 60)
        replica.kill()
        until(lambda: asked.answered_by["teacher"] > 0, 60)
        until(replicas, 60)
        before = asked.answered_by["student"]
        until(lambda: asked.answered_by["student"] > before + 20, 120)
    print(json.dumps(asked.outcomes), json.dumps(asked.answered_by))
    assert set(asked.outcomes) == {"200"}, asked.errors
    assert asked.slowest_s < 15, "a request waited for its deadline"
    time.sleep(1)
    assert by(run.accepted) == {"student"}
