"""Every row gets one fate, whatever the teacher does; an engine's death is nobody's but a
culprit's."""

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from journeyman.errors import ModelError
from journeyman.labels import rows as rows_module
from journeyman.labels.rows import RowLabeler
from journeyman.labels.schema import Filtered, Quarantined
from journeyman.recipe import Logits
from journeyman.teacher.answers import ClassLabels, ContextOverflow, EmptyTarget
from journeyman.teacher.engine import EngineDied
from journeyman.teacher.remote import RateLimited, Unreachable
from tests.journeyman.labels import synthetic

GROUPS = 8
SAID = synthetic.classes(0.7, 0.3)

# What a row does, by its text's first word; what becomes of it is the error class.
ERRORS: dict[str, Callable[[], Exception]] = {
    "overflow": lambda: ContextOverflow(600, 511),
    "empty": lambda: EmptyTarget("nothing to score."),
    "refused": lambda: ValueError("the request is malformed\nwith details"),
    "wordless": ValueError,
    "bug": lambda: RuntimeError("a programmer's mistake"),
}
CLASSES = {
    "kills": "EngineDied",
    "never": "TimeoutError",
    "overflow": "ContextOverflow",
    "empty": "EmptyTarget",
    "refused": "InvalidRequest",
    "wordless": "InvalidRequest",
}
FLAKY = {"slow": TimeoutError, "cut off": Unreachable}  # twice; then the row is answered


class Engine:
    """Stands for an engine and the task on it: dies when a row says so, with all that is in it."""

    def __init__(self, seed: int = 0, accidents: int = 0) -> None:
        """accidents: deaths that no row is to blame for."""
        self.alive = True
        self.starts = self.deaths = self.most_inside = 0
        self.answered: Counter[str] = Counter()
        self.died_on: Counter[str] = Counter()  # deaths by the row that was in it
        self.suspects: set[str] = set()  # were in a dying engine, and have no fate yet
        self.only: set[str] | None = None  # rows that may run, where some run alone
        self.start_error: Exception | None = None
        self._random = random.Random(seed)
        self._accidents = accidents
        self._inside: set[str] = set()
        self._tries: Counter[str] = Counter()

    async def start(self) -> None:
        assert not self.alive
        await asyncio.sleep(0)
        if self.start_error:
            raise self.start_error
        self.starts += 1
        self.alive = True

    def close(self) -> None:
        self.alive = False

    def die(self) -> None:
        self.alive = False
        self.deaths += 1
        self.suspects |= self._inside
        self.died_on.update(self._inside)
        self._inside.clear()

    async def run(self, row: dict[str, Any], seed: int = 0) -> ClassLabels:
        text = row["text"]
        if not self.alive:
            raise EngineDied
        self._enter(text)
        for _ in range(self._random.randint(1, 4)):
            await asyncio.sleep(0)
            if self._accidents and self.alive and not self._random.randrange(20):
                self._accidents -= 1
                self.die()
            if text not in self._inside:
                raise EngineDied
        what = text.split(":")[0]
        if what == "kills":
            self.die()
            raise EngineDied
        self._inside.remove(text)
        self._tries[text] += 1
        if what == "never" or (what in FLAKY and self._tries[text] <= 2):
            raise FLAKY.get(what, TimeoutError)()
        self.suspects.discard(text)
        if what in ERRORS:
            raise ERRORS[what]()
        self.answered[text] += 1
        return SAID

    async def wait_for_death(self, text: str) -> None:
        self._enter(text)
        while text in self._inside:
            await asyncio.sleep(0)
        raise EngineDied

    def _enter(self, text: str) -> None:
        assert text not in self._inside
        if self.only is not None:
            assert text in self.only, "runs beside rows that are to run alone"
        else:
            assert not self.suspects or text in self.suspects, "runs beside suspects"
        self._inside.add(text)
        self.most_inside = max(self.most_inside, len(self._inside))


def row(text: str) -> dict[str, Any]:
    return synthetic.row(text)


class Labeling:
    """A labeler on an engine, as a replica uses it."""

    def __init__(
        self, engine: Engine, in_flight: int = 8, blamed_at_first: int = 10**6, **labels: Any
    ) -> None:
        self.engine = engine
        self.restarts = 0
        self.labeler = RowLabeler(
            Logits(**labels), engine, engine, in_flight, self._restarted,  # type: ignore[arg-type]
            blamed_at_first=blamed_at_first,
        )  # fmt: skip

    def _restarted(self) -> None:
        self.restarts += 1

    async def fate(self, text: str) -> Any:
        try:
            return await self.labeler.fate(row(text))
        finally:
            self.engine.suspects.discard(text)

    async def fates_alone(self, texts: Sequence[str]) -> list[Any]:
        async with self.labeler.alone():
            self.engine.only = set(texts)
            try:
                return await self.labeler.fates_alone([row(text) for text in texts])
            finally:
                self.engine.only = None
                self.engine.suspects -= set(texts)

    async def all(self, texts: Sequence[str]) -> dict[str, Any]:
        fates = await asyncio.gather(*(self.fate(text) for text in texts))
        return dict(zip(texts, fates, strict=True))


def within_seconds(work: Awaitable[Any], seconds: float = 20) -> Any:
    return asyncio.run(asyncio.wait_for(work, seconds))  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def no_pauses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_SHORTEST_PAUSE_S", 0.0)
        yield


def check(fates: dict[str, Any], engine: Engine, max_attempts: int) -> None:
    for text, fate in fates.items():
        what = text.split(":")[0]
        if what in CLASSES:
            assert isinstance(fate, Quarantined), text
            assert fate.error_class == CLASSES[what]
            assert json.loads(fate.input)["text"] == text and fate.message
            assert not engine.answered[text]
        else:
            assert fate is SAID, (text, fate)
            assert engine.answered[text] == 1
    assert engine.alive and not engine.suspects
    for text, fate in fates.items():
        if text.startswith("kills"):
            assert fate.attempts >= engine.died_on[text] >= max_attempts


kinds = st.sampled_from(["fine"] * 6 + ["slow", "cut off", *CLASSES])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(kinds, max_size=120),
    alone=st.lists(kinds, max_size=20),
    in_flight=st.integers(1, 40),
    max_attempts=st.integers(3, 4),
    accidents=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_each_row_has_the_fate_it_deserves_and_nobody_elses(
    kinds: list[str],
    alone: list[str],
    in_flight: int,
    max_attempts: int,
    accidents: int,
    seed: int,
):
    """Rows of several shards at a time, and a shard under suspicion that must run alone."""
    together = [f"{kind}: {i}" for i, kind in enumerate(kinds)]
    suspected = [f"{kind}: alone {i}" for i, kind in enumerate(alone)]

    async def label() -> None:
        engine = Engine(seed, accidents)
        labeling = Labeling(engine, in_flight, max_attempts=max_attempts)
        fates, done = await asyncio.gather(labeling.all(together), labeling.fates_alone(suspected))
        check(fates | dict(zip(suspected, done, strict=True)), engine, max_attempts)
        assert engine.most_inside <= in_flight
        assert labeling.restarts == engine.starts <= engine.deaths
        # A culprit's deaths: beside others, in each smaller group, and alone.
        n = max(in_flight, len(suspected))
        each = 1 + math.ceil(math.log(max(n, 2), GROUPS)) + max_attempts
        culprits = sum(text.startswith("kills") for text in (*together, *suspected))
        assert engine.deaths <= accidents + culprits * each

    within_seconds(label())


def test_only_rows_that_were_in_the_engine_are_suspected_when_it_dies():
    engine = Engine()
    texts = ["kills: it", *(f"fine: {i}" for i in range(200))]
    fates = within_seconds(Labeling(engine, in_flight=4, max_attempts=3).all(texts))
    check(fates, engine, 3)
    assert len(engine.died_on) <= 4


def test_a_row_is_not_blamed_for_a_death_that_it_was_not_alone_in():
    """The last of its group, all others answered: it is tried alone first, max_attempts times."""
    engine = Engine()
    fate = within_seconds(Labeling(engine, max_attempts=1).fate("kills: it"))
    assert (fate.error_class, fate.attempts) == ("EngineDied", 2)
    assert "on this row alone" in fate.message


def test_an_engine_that_dies_on_whatever_it_is_given_is_to_blame_itself():
    """As with settings that vLLM takes and then fails on: no row is labeled, none is blamed."""
    rows = [f"kills: {i}" for i in range(40)]
    engine = Engine()
    with pytest.raises(ModelError, match=r"on each of 3 rows .* and has answered none"):
        within_seconds(Labeling(engine, blamed_at_first=3, max_attempts=3).all(rows))
    assert engine.deaths < 15


def test_an_engine_that_has_answered_is_not_to_blame_for_rows_that_kill_it():
    async def label() -> dict[str, Any]:
        labeling = Labeling(Engine(), blamed_at_first=3, max_attempts=3)
        assert await labeling.fate("fine: 0") is SAID
        return await labeling.all([f"kills: {i}" for i in range(40)])

    fates = within_seconds(label())
    assert {fate.error_class for fate in fates.values()} == {"EngineDied"}


def test_deaths_that_are_nobodys_fault_quarantine_nobody():
    class Unlucky(Engine):
        async def run(self, row: dict[str, Any], seed: int = 0) -> ClassLabels:
            if self.deaths < 4:  # beside the others, in the whole group, alone, and alone again
                asyncio.get_running_loop().call_later(0.01, lambda: self.alive and self.die())
                await self.wait_for_death(row["text"])
            return await super().run(row, seed)

    engine = Unlucky()
    fates = within_seconds(Labeling(engine, max_attempts=3).all(["fine: 1", "fine: 2"]))
    assert list(fates.values()) == [SAID, SAID]


@pytest.mark.parametrize("kind", ["slow", "cut off"])
def test_what_fails_now_and_then_is_tried_again_up_to_max_attempts(kind: str):
    text = f"{kind}: 1"
    within = Engine()
    assert within_seconds(Labeling(within, max_attempts=3).fate("slow: 1")) is SAID
    beyond = Engine()
    fate = within_seconds(Labeling(beyond, max_attempts=2).fate("slow: 1"))
    assert (fate.error_class, fate.attempts) == ("TimeoutError", 2)
    assert "did not answer" in fate.message
    suspected = Engine()
    assert within_seconds(Labeling(suspected, max_attempts=3).fates_alone([text])) == [SAID]


def test_a_row_too_long_is_left_out_where_the_recipe_says_skip():
    labeling = Labeling(Engine(), overflow="skip")
    fate = within_seconds(labeling.fate("overflow: 1"))
    assert isinstance(fate, Filtered)
    assert (fate.filter, fate.value) == ("overflow", 600)


@pytest.mark.parametrize("alone", [False, True])
def test_an_unexpected_error_reaches_whoever_asked_and_the_others_go_on(alone: bool):
    engine = Engine()
    labeling = Labeling(engine)

    async def label() -> list[Any]:
        bad = labeling.fates_alone(["bug: 1"]) if alone else labeling.fate("bug: 1")
        return await asyncio.gather(
            bad, *(labeling.fate(f"fine: {i}") for i in range(20)), return_exceptions=True
        )

    error, *others = within_seconds(label())
    assert isinstance(error, RuntimeError)
    assert others == [SAID] * 20


def test_an_unexpected_error_of_a_suspect_reaches_whoever_asked():
    class Buggy(Engine):
        async def run(self, row: dict[str, Any], seed: int = 0) -> ClassLabels:
            if row["text"] == "fine: 1":
                if self.deaths:
                    raise RuntimeError("a programmer's mistake")
                await self.wait_for_death("fine: 1")
            return await super().run(row, seed)

    async def label() -> list[Any]:
        labeling = Labeling(Buggy())
        texts = ["fine: 1", "kills: it", "fine: 2"]
        return await asyncio.gather(*map(labeling.fate, texts), return_exceptions=True)

    error, killed, fine = within_seconds(label())
    assert isinstance(error, RuntimeError)
    assert killed.error_class == "EngineDied"
    assert fine is SAID


@pytest.mark.parametrize("alone", [False, True])
def test_an_engine_that_cannot_be_started_for_an_unknown_reason_leaves_nobody_waiting(alone: bool):
    engine = Engine()
    engine.start_error = RuntimeError("nobody knows")

    async def label() -> list[Any]:
        labeling = Labeling(engine)
        texts = ["kills: it", *(f"fine: {i}" for i in range(20))]
        if alone:
            work: list[Awaitable[Any]] = [labeling.fates_alone(texts)]
        else:
            work = [labeling.fate(text) for text in texts]
        return await asyncio.gather(*work, return_exceptions=True)

    fates = within_seconds(label())
    failed = [fate for fate in fates if isinstance(fate, RuntimeError)]
    assert failed and all(fate is SAID for fate in fates if fate not in failed)


def test_a_replica_whose_engine_does_not_start_again_leaves(monkeypatch: pytest.MonkeyPatch):
    """Its process ends, and Ray starts another one."""

    class Left(Exception):  # noqa: N818
        pass

    def leave(status: int) -> None:
        assert status == 1
        raise Left

    monkeypatch.setattr(rows_module.os, "_exit", leave)
    engine = Engine()
    engine.start_error = ModelError("it does not fit any more")
    with pytest.raises(Left):
        within_seconds(Labeling(engine).fate("kills: it"))


class Limited(Engine):
    """Behind a URL that takes one request in three, and answers nothing else about the others."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error
        self.asked = 0

    async def run(self, row: dict[str, Any], seed: int = 0) -> ClassLabels:
        self.asked += 1
        if row["text"].startswith("broken") or (
            isinstance(self._error, RateLimited) and self.asked % 3
        ):
            await asyncio.sleep(0)
            raise self._error
        return SAID


def test_too_many_requests_are_no_rows_fault():
    work = Labeling(Limited(RateLimited("429", 0.0)), max_attempts=2)
    fates = within_seconds(work.all([f"fine: {i}" for i in range(40)]))
    assert all(fate is SAID for fate in fates.values())


def test_a_row_that_an_api_always_fails_on_is_found_when_all_others_are_answered():
    work = Labeling(Limited(Unreachable("answered 500")), max_attempts=3)
    work.labeler._outage._longest_s = 0.0
    fates = within_seconds(work.all(["fine: 1", "broken: 2"]))
    assert fates["fine: 1"] is SAID
    assert fates["broken: 2"].error_class == "Unreachable"
