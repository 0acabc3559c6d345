"""What a replica leaves that is gone is taken up by another one, in its order, and counts once."""

import asyncio
import io
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from journeyman.cascade import orphans, watching
from journeyman.cascade.answering import Unlabeled
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.breaker import Breaker
from journeyman.cascade.budgets import Purse
from journeyman.cascade.drift import Audit, Watch, start_watch
from journeyman.cascade.policy import Decision, Policy
from journeyman.cascade.refusals import TeacherAway
from journeyman.cascade.spooling import Spool, Spools, Waiting
from journeyman.cascade.watching import LOST
from journeyman.certify.calibration import Calibrator
from journeyman.certify.confidence import Confidence
from journeyman.folder import Folder
from journeyman.recipe import Breaker as Settings
from journeyman.recipe import Feedback
from journeyman.teacher.answers import ClassLabels
from serve import agreement, loading, members
from serve.accounts import account
from serve.agreement import Agreed, Agreement, Report
from serve.ingress import Ingress, _watch
from serve.live import Served
from serve.members import Member
from serve.scaling import Busy
from serve.students import readers
from tests.journeyman.cascade.test_auditing import Teacher
from tests.serve import tiny

POLICY = Policy(
    label_names=("no", "yes"),
    confidence=Confidence(calibrator=Calibrator(temperature=1.0), score="margin"),
    accept_above=0.5,
    teacher_log_prior=None,
)
SAME, DIFFERS, ESCALATED = (Audit(score=s, loss=n) for s, n in ((0.8, 0), (0.8, 1), (0.3, 0)))


def answer(confidence: float = 0.8) -> Decision:
    return Decision(
        answered_by="student",
        label="yes",
        confidence=confidence,
        probabilities=np.array([0.1, 0.9]),
    )


def a_watch() -> Watch:
    return start_watch("system_agreement", 0.1, (0.5, 0.7, 0.9))


def after(*audits: Audit) -> np.ndarray:
    watch = a_watch()
    for audit in audits:
        watch = watch.audited(audit)
    return watch.log_detectors


class Replicas:
    """Of one cascade, whose feedback goes to `to`."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(members, "EVERY_S", 0.01)
        monkeypatch.setattr(members, "_ON_ITS_WAY_S", 0.05)
        monkeypatch.setattr(orphans, "ASKED_FOR_S", 0.0)
        self._patch, self._tmp = monkeypatch, tmp_path
        self.to, self.shared = tmp_path / "to", Agreement(30.0)

    def one(self, host: str, teacher: Teacher, keeps: bool = True) -> Member:
        """Not running. keeps: what is to lie beside the feedback."""
        spools = self.spools(host)

        def auditor(spool: Spool) -> Auditor:
            return Auditor(POLICY, teacher, None, busy=lambda: False, spool=spool)  # type: ignore[arg-type]

        name = f"{host}-{id(teacher)}"
        return Member(
            replica=name, name=name, bundle="b", fresh=a_watch(), feedback=str(self.to),
            breaker=Breaker(Settings()), auditor=auditor(spool := spools.of(name)),
            tighten=lambda _: None, ask=self.ask, heard=lambda _: None,
            keep=Folder(self.to).put if keeps else None,
            spools=spools, spool=spool, heir=auditor,
        )  # fmt: skip

    def spools(self, host: str) -> Spools:
        return Spools(spool=self._tmp / host, to=Folder(self.to), bundle="b")

    async def ask(self, report: Report) -> Agreed:
        return await self.shared.exchange(report)

    async def finds_gone(self, living: Member) -> None:
        """All others, without the minute that passes before."""
        with self._patch.context() as patched:
            patched.setattr(agreement, "GONE_AFTER_S", 0.0)
            await living.exchange()

    async def gives_up(self, living: Member) -> None:
        """Those that are gone."""
        with self._patch.context() as patched:
            patched.setattr(orphans, "GIVEN_UP_AFTER_S", 0.0)
            await self.finds_gone(living)

    @property
    def kept(self) -> watching.Kept:
        kept = watching.stored(Folder(self.to), "b")
        assert kept
        return kept

    def texts(self, host: str) -> list[Path]:
        return [*(self._tmp / host).rglob("*.jsonl"), *(self.to / "audits").rglob("*.jsonl")]


@pytest.fixture
def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replicas:
    return Replicas(tmp_path, monkeypatch)


def three_wait(member: Member) -> None:
    """Behind the second is one of which the outcome is known."""
    assert member.auditor
    member.auditor.add("y1", answer())
    member.auditor.add("n", answer())
    member.auditor.escalated(answer(0.3))
    member.auditor.add("y2", answer())


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def worked(member: Member, holds: Callable[[], bool]) -> None:
    assert member.auditor
    task = asyncio.create_task(member.auditor.run())
    await until(holds)
    task.cancel()


def test_what_waited_in_a_killed_replica_is_taken_up_in_its_order_and_counts_once(
    replicas: Replicas,
):
    async def scenario() -> Teacher:
        teacher = Teacher()
        dies, lives = replicas.one("host", Teacher(away=True)), replicas.one("host", teacher)
        await lives.exchange()
        three_wait(dies)
        await dies.exchange()
        assert replicas.kept.owed_by(dies.name) == 4
        assert lives.auditor
        lives.auditor.escalated(answer(0.3))
        await lives.exchange()
        await replicas.finds_gone(lives)
        await until(lambda: not lives._taking_up)
        for _ in range(3):
            await replicas.finds_gone(lives)
        assert lives.counts.pending == lives.counts.lost == lives.counts.stopped == 0
        return teacher

    teacher = asyncio.run(scenario())
    assert teacher.asked == ["y1", "n", "y2"]
    kept = replicas.kept
    assert kept.watch.n_audits == 5 and not any(one.n_owed for one in kept.members.values())
    expected = after(ESCALATED, SAME, DIFFERS, ESCALATED, SAME)
    assert kept.watch.log_detectors == pytest.approx(expected)
    assert not replicas.texts("host")


def test_a_text_that_was_settled_just_before_the_kill_is_not_asked_again(replicas: Replicas):
    """Nor does one count again that the watch has."""

    class Leaves(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            said = await super().labels(texts)
            self.away = texts == ["n"]
            return said

    async def scenario() -> tuple[Teacher, Teacher]:
        before, teacher = Leaves(), Teacher()
        dies, lives = replicas.one("host", before), replicas.one("host", teacher)
        await lives.exchange()
        assert dies.auditor
        dies.auditor.add("y0", answer())
        await worked(dies, lambda: dies.auditor.n_found == 1)  # type: ignore[union-attr]
        await dies.exchange()
        dies.auditor.add("x", answer())
        three_wait(dies)
        await dies.exchange()
        await worked(dies, lambda: dies.auditor.n_pending == 1)  # type: ignore[union-attr]
        assert replicas.kept.watch.n_audits == 1
        await replicas.finds_gone(lives)
        await until(lambda: not lives._taking_up)
        return before, teacher

    before, teacher = asyncio.run(scenario())
    assert (before.asked, teacher.asked) == (["y0", "x", "y1", "n"], ["y2"])
    expected = after(SAME, SAME, DIFFERS, ESCALATED, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)
    assert not replicas.texts("host")


def test_what_waits_as_a_replica_stops_in_order_is_taken_up_on_any_host(replicas: Replicas):
    async def scenario() -> tuple[Teacher, Member]:
        teacher = Teacher()
        stops, lives = replicas.one("one", Teacher(away=True)), replicas.one("other", teacher)
        await lives.exchange()
        three_wait(stops)
        await stops.exchange()
        await stops.leave()
        assert replicas.texts("one")
        stops.arrived()
        await lives.exchange()  # at once
        await until(lambda: not lives._taking_up)
        return teacher, lives

    teacher, lives = asyncio.run(scenario())
    assert teacher.asked == ["y1", "n", "y2"] and lives.counts.stopped == 0
    expected = after(SAME, DIFFERS, ESCALATED, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)
    assert not replicas.texts("one") and not replicas.texts("other")


@pytest.mark.parametrize("by_an_heir", [False, True])
def test_a_text_that_is_left_out_is_none_that_is_lost_where_what_waits_is_handed_on(
    by_an_heir: bool, replicas: Replicas
):
    """Before those that wait, between and behind them; of its own ones or those of another one."""

    class Slow(Teacher):
        """Of three texts it cannot read, and is away for all others."""

        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            self.away = "x" not in texts[0]
            return await super().labels(texts)

    async def leave_out(member: Member) -> None:
        assert member.auditor
        for one in [*member.auditor.unkept]:
            if isinstance(one, Waiting) and one.text == "x":
                await member.auditor._ask(member.auditor._queue.index(one))

    async def scenario() -> Teacher:
        teacher = Teacher()
        stops, lives = replicas.one("one", Slow(away=True)), replicas.one("other", teacher)
        first = replicas.one("one", Slow(away=True)) if by_an_heir else stops
        assert first.auditor
        await (stops if by_an_heir else lives).exchange()
        for text in ("", "", "x", "y1", "x", "n", "y2", "x"):
            if text:
                first.auditor.add(text, answer())
            else:
                first.auditor.escalated(answer(0.3))
        await first.exchange()
        if by_an_heir:
            await replicas.finds_gone(stops)
            await until(lambda: bool(stops._heirs))
            await lives.exchange()
        await leave_out(stops._heirs[0] if by_an_heir else stops)
        await stops.leave()
        stops.arrived()
        assert not replicas.texts("one")[1:]  # but what is handed on
        await lives.exchange()
        await until(lambda: not lives._taking_up)
        assert lives.counts.lost == lives.counts.stopped == 0
        return teacher

    assert asyncio.run(scenario()).asked == ["y1", "n", "y2"]
    expected = after(ESCALATED, ESCALATED, SAME, DIFFERS, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)
    assert not replicas.texts("one") and not replicas.texts("other")


def test_what_is_handed_on_once_another_one_has_it_from_the_spool_does_not_stay(
    replicas: Replicas,
):
    """As where the store is slower than the teacher."""

    async def scenario() -> None:
        stops, lives = replicas.one("host", Teacher(away=True)), replicas.one("host", Teacher())
        await lives.exchange()
        three_wait(stops)
        late: list[tuple[str, bytes]] = []
        stops.keep = lambda name, content: late.append((name, content))
        await stops.leave()
        await lives.exchange()
        await until(lambda: replicas.kept.watch.n_audits == 4)
        for name, content in late:
            Folder(replicas.to).put(name, content)
        await until(lambda: not lives._taking_up)

    asyncio.run(scenario())
    assert not replicas.texts("host")


def test_one_that_stops_unheard_leaves_what_waits_to_who_comes_next(replicas: Replicas):
    """As where all of Serve stops: the outcomes that it had count, and so do those to come."""

    async def nobody(_: Report) -> Agreed:
        raise TimeoutError

    async def scenario() -> Teacher:
        teacher = Teacher()
        stops = replicas.one("one", Teacher(away=True))
        await stops.exchange()
        assert stops.auditor
        stops.auditor.escalated(answer(0.3))
        three_wait(stops)
        stops.ask = nobody
        await stops.leave()
        replicas.shared = Agreement(30.0)
        lives = replicas.one("other", teacher)
        await lives.exchange()
        await until(lambda: not lives._taking_up)
        return teacher

    teacher = asyncio.run(scenario())
    assert teacher.asked == ["y1", "n", "y2"]
    expected = after(ESCALATED, SAME, DIFFERS, ESCALATED, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)


@pytest.mark.parametrize("in_order", [False, True])
def test_of_what_nobody_can_read_the_first_counts_as_an_error_and_the_others_are_left_out(
    in_order: bool, replicas: Replicas
):
    """Its host is gone, or its disk; after a while in which those that live were asked."""

    async def scenario() -> Member:
        goes, lives = (
            replicas.one(host, Teacher(away=True), keeps=False) for host in ("one", "other")
        )
        await lives.exchange()
        three_wait(goes)
        await goes.exchange()
        if in_order:
            await goes.leave()
        for _ in range(3):
            await replicas.finds_gone(lives)
            await until(lambda: not lives._taking_up)
        assert replicas.kept.watch.n_audits == 0
        await replicas.gives_up(lives)
        await replicas.gives_up(lives)
        return lives

    lives = asyncio.run(scenario())
    assert replicas.kept.watch.log_detectors == pytest.approx(after(LOST))
    assert (lives.counts.lost, lives.counts.stopped) == (1, 3)


def test_one_that_took_up_and_is_killed_leaves_it_to_a_third(replicas: Replicas):
    async def scenario() -> list[str]:
        teachers = [Teacher(away=True), Teacher(), Teacher()]
        first, second, third = (replicas.one("host", teacher) for teacher in teachers)
        await second.exchange()
        three_wait(first)
        await first.exchange()
        await replicas.finds_gone(second)
        await until(lambda: bool(second._heirs))
        await until(lambda: replicas.kept.watch.n_audits > 0)
        for task in second._taking_up.values():
            task.cancel()  # killed
        await asyncio.sleep(0.05)
        for _ in range(2):
            await replicas.finds_gone(third)
            await until(lambda: not third._taking_up)
        return teachers[1].asked + teachers[2].asked

    assert asyncio.run(scenario()) == ["y1", "n", "y2"]
    expected = after(SAME, DIFFERS, ESCALATED, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)


def test_one_that_took_up_and_stops_in_order_leaves_it_to_a_third(replicas: Replicas):
    async def scenario() -> Teacher:
        teacher = Teacher()
        first, second = (replicas.one("host", Teacher(away=True)) for _ in range(2))
        third = replicas.one("other", teacher)
        await second.exchange()
        three_wait(first)
        await first.exchange()
        await replicas.finds_gone(second)
        await until(lambda: bool(second._heirs))
        assert second.counts.pending == 3
        await third.exchange()
        await second.leave()
        await third.exchange()
        await until(lambda: not third._taking_up)
        return teacher

    assert asyncio.run(scenario()).asked == ["y1", "n", "y2"]
    expected = after(SAME, DIFFERS, ESCALATED, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)


def test_one_that_was_only_thought_to_be_gone_is_counted_once(replicas: Replicas):
    async def scenario() -> None:
        hangs, lives = replicas.one("host", Teacher()), replicas.one("host", Teacher())
        await lives.exchange()
        three_wait(hangs)
        await hangs.exchange()
        await replicas.finds_gone(lives)
        await until(lambda: replicas.kept.watch.n_audits == 4)
        assert hangs.auditor
        await worked(hangs, lambda: not hangs.auditor.n_pending)  # type: ignore[union-attr]
        hangs.auditor.add("y3", answer())
        await worked(hangs, lambda: not hangs.auditor.n_pending)  # type: ignore[union-attr]
        await hangs.exchange()

    asyncio.run(scenario())
    expected = after(SAME, DIFFERS, ESCALATED, SAME, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)


def test_a_spool_for_which_a_disk_had_no_room_is_written_anew_as_soon_as_there_is_some(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
):
    """However many come meanwhile, and whatever is left out of what waits."""

    async def scenario() -> Teacher:
        teacher = Teacher()
        dies, lives = replicas.one("host", Teacher()), replicas.one("host", teacher)
        assert dies.auditor and dies.spool
        await lives.exchange()
        dies.auditor.add("x", answer())
        dies.auditor.escalated(answer(0.3))
        dies.auditor.add("y1", answer())
        with monkeypatch.context() as patched:
            dies.spool._close()
            patched.setattr(Path, "open", lambda *_, **__: io.FileIO("/dev/full", "ab"))
            dies.auditor.add("x", answer())
            await dies.auditor._ask(0)
            await dies.exchange()
            assert dies.unspooled and "No space" in dies.unspooled
            assert not replicas.texts("host")
        dies.auditor.add("n", answer())
        await dies.auditor._ask(1)  # an x
        await dies.exchange()
        assert dies.unspooled is None and dies.auditor.n_left_out == 2
        dies.auditor.add("y2", answer())
        await dies.exchange()
        await replicas.finds_gone(lives)
        await until(lambda: not lives._taking_up)
        assert lives.counts.lost == lives.counts.stopped == 0
        return teacher

    assert asyncio.run(scenario()).asked == ["y1", "n", "y2"]
    expected = after(ESCALATED, SAME, DIFFERS, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)


def test_texts_of_one_that_was_given_up_do_not_stay(replicas: Replicas):

    async def scenario() -> None:
        stops, lives = replicas.one("host", Teacher(away=True)), replicas.one("far", Teacher())
        lives.heir = None
        await lives.exchange()
        three_wait(stops)
        await stops.exchange()
        await stops.leave()
        stops.arrived()
        assert replicas.texts("host")
        for _ in range(2):
            await replicas.gives_up(lives)

    asyncio.run(scenario())
    assert replicas.kept.watch.n_audits == 1 and not replicas.texts("host")


def test_an_error_that_nobody_thought_of_ends_one_exchange_and_no_other(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
):
    """Nor does one of cleaning end any. A text in its words is not told."""
    n_asked, failures = 0, []

    async def ask(report: Report) -> Agreed:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 1:
            raise ZeroDivisionError("a text")
        failures.append(member.failure)
        return await replicas.ask(report)

    def cannot(_: Spools) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        running = asyncio.create_task(member.run())
        await until(lambda: n_asked > 2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    monkeypatch.setattr(Spools, "clean", cannot)
    member = replicas.one("host", Teacher())
    member.ask = ask
    asyncio.run(scenario())
    assert "ZeroDivisionError" in failures[0] and "a text" not in failures[0]
    assert failures[1] is None and member.failure is None


def test_one_that_comes_back_after_its_heir_has_left_is_counted_once(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
):
    """For a day. Of one that was given up the error stands for the first."""

    async def scenario() -> None:
        hangs, lives = replicas.one("host", Teacher()), replicas.one("host", Teacher())
        lost = replicas.one("far", Teacher())
        await lives.exchange()
        three_wait(hangs)
        await hangs.exchange()
        await replicas.finds_gone(lives)
        await until(lambda: not lives._taking_up)
        three_wait(lost)
        await lost.exchange()
        for _ in range(3):
            await replicas.gives_up(lives)
        assert replicas.kept.last_of(hangs.name) == 4 and not replicas.kept.owed_by(lost.name)
        for member in (hangs, lost):
            assert member.auditor
            await worked(member, lambda m=member: not m.auditor.n_pending)  # type: ignore[misc]
            await member.exchange()
        assert replicas.kept.watch.n_audits == 8
        monkeypatch.setattr(agreement, "_REMEMBERED_S", 0.0)
        for _ in range(5):
            await replicas.gives_up(lives)
        lives.auditor.escalated(answer(0.3))  # type: ignore[union-attr]
        await lives.exchange()
        assert list(replicas.kept.members) == [lives.name]

    asyncio.run(scenario())
    expected = after(SAME, DIFFERS, ESCALATED, SAME, LOST, DIFFERS, ESCALATED, SAME, ESCALATED)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)


def test_one_that_took_up_stops_as_soon_as_the_other_one_tells_more_by_itself(
    replicas: Replicas,
):
    """And leaves it its files."""

    async def scenario() -> None:
        hangs = replicas.one("host", Teacher())
        lives = replicas.one("host", Teacher(away=True))
        await lives.exchange()
        three_wait(hangs)
        await hangs.exchange()
        await replicas.finds_gone(lives)
        await until(lambda: lives.counts.pending == 3)
        assert hangs.auditor
        await hangs.auditor._ask(0)
        hangs.auditor.add("y3", answer())
        await hangs.exchange()
        assert replicas.kept.watch.n_audits == 1
        await until(lambda: not lives._taking_up)
        assert lives.counts.pending == 0
        await lives.leave()
        lives.arrived()
        left = replicas.spools("host").left_by(hangs.name, 1, 4)
        assert left and [one.number for one in left.entries] == [2, 3, 4, 5]
        await worked(hangs, lambda: not hangs.auditor.n_pending)  # type: ignore[union-attr]
        await hangs.exchange()

    asyncio.run(scenario())
    expected = after(SAME, DIFFERS, ESCALATED, SAME, SAME)
    assert replicas.kept.watch.log_detectors == pytest.approx(expected)


def test_audits_that_were_taken_up_and_a_replicas_own_are_asked_one_at_a_time(tmp_path: Path):
    under_way, most = 0, 0

    class Slow(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.005)
            under_way -= 1
            return await super().labels(texts)

    async def scenario() -> None:
        turn, teacher = asyncio.Lock(), Slow()
        of_both = [
            Auditor(POLICY, teacher, None, busy=lambda: False, turn=turn)  # type: ignore[arg-type]
            for _ in range(2)
        ]
        for auditor in of_both:
            for _ in range(10):
                auditor.add("y", answer())
        tasks = [asyncio.create_task(auditor.run()) for auditor in of_both]
        await until(lambda: not any(auditor.n_pending for auditor in of_both))
        for task in tasks:
            task.cancel()

    asyncio.run(scenario())
    assert most == 1


def test_nothing_is_written_where_no_feedback_is_kept(tmp_path: Path):
    def member(feedback: Any) -> Member:
        loaded: Any = SimpleNamespace(
            recipe=SimpleNamespace(cascade=SimpleNamespace(feedback=feedback)),
            bundle=SimpleNamespace(bundle_id="b"),
        )
        ingress: Any = SimpleNamespace(
            _replica="r", _agreement=SimpleNamespace(exchange=SimpleNamespace(remote=None)),
            _heard=None, _audits=print,
        )  # fmt: skip
        cascade, rule = SimpleNamespace(breaker=None), SimpleNamespace(tighten=None)

        def auditor(spool: Spool) -> Auditor:
            return Auditor(POLICY, None, None, busy=lambda: True, spool=spool)  # type: ignore[arg-type]

        return Ingress._member(ingress, loaded, rule, cascade, a_watch(), None, auditor)  # type: ignore[arg-type]

    none = member(None)
    assert none.auditor is None and none.spool is None and none.spools is None
    kept = member(SimpleNamespace(to=str(tmp_path / "to")))
    assert kept.auditor
    kept.auditor.undecided("a text")
    (file,) = tmp_path.rglob("*.jsonl")
    assert file.relative_to(tmp_path).parts[:3] == ("to", "audits", "b")
    without = Auditor(POLICY, None, None, busy=lambda: True)  # type: ignore[arg-type]
    without.undecided("a text")
    assert list(tmp_path.rglob("*.jsonl")) == [file]


class Here(Ingress):
    """In no deployment."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


def an_ingress(shared: Agreement, teacher: Teacher | None = None) -> Any:
    ingress: Any = Here.__new__(Here)
    ingress._replica = uuid.uuid4().hex
    ingress._agreement = SimpleNamespace(exchange=SimpleNamespace(remote=shared.exchange))
    ingress._teacher, ingress._apart, ingress._busy = teacher, None, Busy()
    ingress._measured, ingress._loaded, ingress._purse = {}, {}, Purse({})
    ingress._heard = lambda _: None
    return ingress


def test_figures_of_ingresses_add_up_and_what_a_shadow_decided_on_is_nothing_it_answered(
    run: tiny.Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(members, "EVERY_S", 0.01)
    loaded = loading.load(run.bundle_dir)
    texts = run.accepted[:3]

    def by_student(served: Served) -> int:
        return served.figures()["totals"]["student"]

    async def scenario() -> None:
        shared = Agreement(30.0)
        one, other = an_ingress(shared), an_ingress(shared)
        tried = one._served(loaded, readers(loaded), None)
        elsewhere = other._served(loaded, readers(loaded), None)
        await tried.decide(texts)
        await until(lambda: by_student(elsewhere) == 3)  # it stands beside them as a shadow
        promoted = one._served(loaded, readers(loaded), None)
        await until(lambda: by_student(elsewhere) == 0)
        await promoted.answering.answer(texts[:2])
        assert by_student(promoted) == 2
        await until(lambda: by_student(elsewhere) == 2 == elsewhere.figures()["replicas"])
        await elsewhere.answering.answer(texts[:1])
        await until(lambda: by_student(promoted) == 3 == by_student(elsewhere))
        await promoted.close()
        await until(lambda: by_student(elsewhere) == 1)
        for served in (tried, elsewhere):
            await served.close()

    asyncio.run(scenario())


def test_audits_of_an_ingress_are_taken_up_by_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As it makes its auditors and their spools."""
    monkeypatch.setattr(members, "EVERY_S", 0.01)
    monkeypatch.setattr(members, "_ON_ITS_WAY_S", 0.05)
    run, to = tiny.write_run(tmp_path), tmp_path / "to"
    loaded = loading.load(run.bundle_dir)
    feedback = Feedback(to=str(to), audit_rate=1.0)
    cascade = loaded.recipe.cascade.model_copy(update={"feedback": feedback})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"cascade": cascade}))
    shared = Agreement(30.0)

    class Labels(Teacher):
        rests = False

        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            if self.away:
                raise TeacherAway("away", 1.0)
            assert account.get().is_audit
            self.asked += texts
            return [
                ClassLabels(class_logprobs=np.log([0.8, 0.1, 0.1]), label_mass=None,
                            n_prompt_tokens=1, n_output_tokens=0)
                for _ in texts
            ]  # fmt: skip

    def served(teacher: Labels) -> Served:
        return an_ingress(shared, teacher)._served(loaded, readers(loaded), _watch(loaded))

    async def scenario() -> Labels:
        stops, teacher = served(Labels(away=True)), Labels()
        for text in texts:
            await stops.answering.answer([text])
        lives = served(teacher)
        await stops.close()
        await until(lambda: (lives.figures()["watch"] or {}).get("audits") == 3)
        assert lives.figures()["watch"]["pending"] == lives.figures()["watch"]["stopped"] == 0
        await lives.close()
        return teacher

    accepted = run.scores > run.bundle.accept_above
    texts = [text for text, by_student in zip(tiny.TEXTS, accepted, strict=True) if by_student][:3]
    assert asyncio.run(scenario()).asked == texts
    assert not list(to.rglob("*.jsonl"))
