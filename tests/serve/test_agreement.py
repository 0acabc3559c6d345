"""Replicas agree on a threshold that audits tighten, and on a breaker; nothing loosens it."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from journeyman.cascade import orphans, watching
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.breaker import Breaker
from journeyman.cascade.drift import Audit, Watch, start_watch
from journeyman.cascade.feedback import Journal
from journeyman.cascade.watching import Heard, Kept, Outcome
from journeyman.certify.curve import CurvePoint
from journeyman.errors import ClusterError, DataError
from journeyman.folder import Folder
from journeyman.recipe import Breaker as Settings
from serve import agreement
from serve.agreement import Agreement, Report
from serve.members import Member
from tests.serve import tiny

WRONG = Audit(score=0.95, loss=1)
RIGHT = Audit(score=0.95, loss=0)


def a_watch(*thresholds: float) -> Watch:
    return start_watch("system_agreement", 0.1, thresholds or (0.5, 0.7, 0.9))


def report(
    to: Path | None, *audits: Audit, batch: int = 1, replica: str = "a", owed: int = 0
) -> Report:
    numbered = tuple(Outcome(100 * batch + i, audit) for i, audit in enumerate(audits))
    return Report(
        feedback=str(to) if to else None,
        replica=replica, member=replica, bundle="b", news=None, fresh=a_watch(),
        audits=numbered, n_owed=owed,
    )  # fmt: skip


@pytest.fixture
def given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Who is not heard just now is gone, and what it left is taken up by nobody."""

    def give_up() -> None:
        monkeypatch.setattr(agreement, "GONE_AFTER_S", 0.0)
        monkeypatch.setattr(orphans, "GIVEN_UP_AFTER_S", 0.0)

    return give_up


def found_out(member: Member, *audits: Audit) -> None:
    auditor = member.auditor
    assert auditor
    auditor._outcomes += [Outcome(auditor._number(), audit) for audit in audits]


def exchange(shared: Agreement, *reports: Report) -> agreement.Agreed:
    async def all_of_them() -> agreement.Agreed:
        for one in reports:
            agreed = await shared.exchange(one)
        return agreed

    return asyncio.run(all_of_them())


def test_good_audits_leave_the_certified_threshold_and_bad_ones_tighten_it(tmp_path: Path):
    shared = Agreement(30.0)
    agreed = exchange(shared, report(tmp_path, *[RIGHT] * 50))
    assert (agreed.accept_above, agreed.rung, agreed.n_audits) == (0.5, 0, 50)
    # Wrong on the first rung only: the second one stands.
    agreed = exchange(shared, report(tmp_path, *[Audit(score=0.6, loss=1)] * 12, batch=2))
    assert (agreed.accept_above, agreed.rung) == (0.7, 1)
    agreed = exchange(shared, report(tmp_path, *[WRONG] * 12, batch=3))
    assert (agreed.accept_above, agreed.rung) == (float("inf"), None)


def test_audits_of_all_replicas_are_one_evidence(tmp_path: Path):
    shared = Agreement(30.0)
    agreed = exchange(shared, *(report(tmp_path, WRONG, WRONG, replica=str(i)) for i in range(6)))
    assert agreed.n_audits == 12 and agreed.rung is None


def test_a_report_that_is_sent_again_counts_once(tmp_path: Path):
    shared = Agreement(30.0)
    assert exchange(shared, *[report(tmp_path, WRONG)] * 20).n_audits == 1


def test_a_restart_keeps_what_was_found(tmp_path: Path):
    before = exchange(Agreement(30.0), report(tmp_path, *[WRONG] * 12))
    after = exchange(Agreement(30.0), report(tmp_path, batch=0))
    assert (after.accept_above, after.n_audits) == (before.accept_above, 12)


def test_the_written_watch_is_the_watch(tmp_path: Path):
    watch = a_watch()
    for audit in [RIGHT, WRONG, RIGHT, Audit(score=0.6, loss=1)]:
        watch = watch.audited(audit)
    kept = Kept(watch=watch, members={"a": Heard(last=3, n_owed=2)})
    read = watching.from_json(watching.to_json(kept, "b"))
    again = read.watch
    assert read.members == kept.members
    assert again.log_detectors == pytest.approx(watch.log_detectors)
    assert again.n_audits == 4 and again.threshold == watch.threshold


def test_a_damaged_file_is_said_and_not_begun_anew(tmp_path: Path):
    shared = Agreement(30.0)
    exchange(shared, report(tmp_path, *[WRONG] * 12))
    (tmp_path / "watch" / "b.json").write_text("{")
    with pytest.raises(DataError, match=r"b\.json: damaged.*delete it"):
        exchange(Agreement(30.0), report(tmp_path, batch=0))


def test_of_the_audits_that_died_with_their_replica_the_first_counts_as_an_error(
    tmp_path: Path, given_up_at_once: Callable[[], None]
):
    """It alone may be missing for what it is. With a queue of any length the promise stands."""
    shared = Agreement(30.0)
    before = exchange(shared, report(tmp_path, RIGHT, replica="dies", owed=500))
    given_up_at_once()
    agreed = exchange(shared, report(tmp_path, RIGHT, replica="lives"))
    assert (before.n_audits, agreed.n_audits, agreed.rung) == (1, 3, 0)
    assert (agreed.n_lost, agreed.n_stopped) == (1, 499)
    expected = a_watch().audited(RIGHT).audited(watching.LOST).audited(RIGHT)
    kept = watching.stored(Folder(tmp_path), "b")
    assert kept and kept.watch.log_detectors == pytest.approx(expected.log_detectors)


def test_a_replica_that_dies_while_the_store_is_away_takes_no_outcome_along_uncounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it had found counts as what it was, and the first that was to come as an error."""
    in_its_place, expected = tmp_path / "watch", a_watch()
    for known in (False, True):  # the store fails at its first reading, or at a later writing
        shared = Agreement(30.0)
        before = exchange(shared, report(tmp_path, replica="lives")).n_audits if known else 0
        shutil.rmtree(in_its_place, ignore_errors=True)
        in_its_place.write_text("no folder")
        dying = report(tmp_path, RIGHT, RIGHT, WRONG, replica=f"dies {known}", owed=20)
        for _ in range(3):
            with pytest.raises(ClusterError):
                exchange(shared, dying)
        in_its_place.unlink()
        with monkeypatch.context() as patched:
            patched.setattr(agreement, "GONE_AFTER_S", 0.0)
            patched.setattr(orphans, "GIVEN_UP_AFTER_S", 0.0)
            exchange(shared, report(tmp_path, replica="lives", batch=2))
            after = exchange(shared, report(tmp_path, replica="lives", batch=3)).n_audits
        assert after == before + 3 + 1
        found = watching.stored(Folder(tmp_path), "b")
        for audit in (RIGHT, RIGHT, WRONG, watching.LOST):
            expected = expected.audited(audit)
        assert found and found.watch.log_detectors == pytest.approx(expected.log_detectors)


def test_what_a_replica_owes_is_known_to_who_agrees_after_a_restart(
    tmp_path: Path, given_up_at_once: Callable[[], None]
):
    exchange(
        Agreement(30.0),
        report(tmp_path, RIGHT, replica="dies", owed=12),
        report(tmp_path, replica="stays", owed=3),
        report(tmp_path, RIGHT, RIGHT, RIGHT, replica="stays"),  # and has paid
    )
    given_up_at_once()
    anew = Agreement(30.0)
    agreed = exchange(anew, report(tmp_path, batch=0), report(tmp_path, batch=0))
    assert agreed.n_audits == 1 + 3 + 1
    assert exchange(anew, report(tmp_path, batch=0)).n_audits == 5


def test_a_batch_counts_once_over_a_restart_of_who_agrees(tmp_path: Path):
    again = report(tmp_path, WRONG, batch=7)
    exchange(Agreement(30.0), again)
    assert exchange(Agreement(30.0), again).n_audits == 1


def a_member(ask, keep=None, *outcomes: Audit, to: Path) -> Member:
    auditor = Auditor(None, None, None, busy=lambda: True)  # type: ignore[arg-type]
    member = Member(
        replica="a", bundle="b", fresh=a_watch(), feedback=str(to),
        breaker=Breaker(Settings()), auditor=auditor,
        tighten=lambda _: None, ask=ask, heard=lambda _: None, keep=keep,
    )  # fmt: skip
    found_out(member, *outcomes)
    return member


def test_one_that_stops_hands_on_its_unheard_batch_and_what_has_come_since(tmp_path: Path):
    shared, away = Agreement(30.0), True

    async def ask(one: Report) -> agreement.Agreed:
        if away:
            raise TimeoutError
        return await shared.exchange(one)

    async def scenario() -> Member:
        nonlocal away
        member = a_member(ask, None, WRONG, WRONG, to=tmp_path)
        await member.exchange()
        found_out(member, *[RIGHT] * 3)
        away = False
        await member.leave()
        return member

    last = asyncio.run(scenario()).last
    assert last and last.n_audits == 5


@pytest.mark.parametrize("store_is_away", [False, True])
def test_last_words_that_nobody_heard_are_read_by_who_comes_next(
    tmp_path: Path, store_is_away: bool, given_up_at_once: Callable[[], None]
):
    """Once, and also where they waited on the replica's own disk for the store to come back. One
    that still waited, and that nobody takes up, counts as an error."""
    to, spool = tmp_path / "to", tmp_path / "spool"

    def put(name: str, content: bytes) -> None:
        if store_is_away:
            raise ClusterError("the store cannot be reached")
        Folder(to).put(name, content)

    async def stop() -> None:
        shared = Agreement(30.0)
        journal = Journal(spool, put, roll_rows=10, roll_s=60)
        member = a_member(shared.exchange, journal.keep, to=to)
        assert member.auditor
        await member.exchange()
        found_out(member, RIGHT, WRONG)
        member.auditor.undecided("waits")
        await member.exchange()  # owes one
        member.ask = nobody
        found_out(member, RIGHT, Audit(score=-float("inf"), loss=0))
        await member.exchange()
        found_out(member, WRONG)
        await member.leave()
        journal.close()

    async def nobody(_: Report) -> agreement.Agreed:
        raise TimeoutError

    asyncio.run(stop())
    Journal(spool, Folder(to).put, roll_rows=10, roll_s=60).close()
    assert len(list((to / "watch" / "b").iterdir())) == 1
    anew = Agreement(30.0)
    assert exchange(anew, report(to, replica="next", batch=0)).n_audits == 5
    assert not list((to / "watch" / "b").iterdir())
    given_up_at_once()
    assert exchange(anew, report(to, replica="next", batch=0)).n_audits == 6
    assert exchange(Agreement(30.0), report(to, replica="next", batch=0)).n_audits == 6


def test_without_feedback_only_the_breaker_is_shared():
    agreed = exchange(Agreement(30.0), report(None, WRONG))
    assert agreed.accept_above is None and agreed.breaker.open_for_s is None


def test_replicas_are_counted_as_long_as_they_are_heard(monkeypatch: pytest.MonkeyPatch):
    shared = Agreement(30.0)

    def counted(replica: str) -> int:
        return exchange(shared, report(None, replica=replica)).n_replicas

    assert [counted("a"), counted("b"), counted("b"), counted("a")] == [1, 2, 2, 2]
    now = time.monotonic()
    monkeypatch.setattr(agreement.time, "monotonic", lambda: now + agreement.GONE_AFTER_S + 1)
    assert [counted("b"), counted("c")] == [1, 2]


def test_the_ladder_comes_from_the_bundles_curve(tmp_path: Path):
    run = tiny.write_run(tmp_path)
    points = [
        CurvePoint(threshold=t, coverage=c, system_disagreement=0.0, selective_disagreement=None)
        for t, c in ((None, 0.0), (0.95, 0.2), (0.9, 0.38), (0.8, 0.6), (0.7, 0.8), (0.1, 1.0))
    ]
    guarantee = run.bundle.guarantees[0].model_copy(update={"threshold": 0.7})
    bundle = run.bundle.model_copy(
        update={"threshold": 0.7, "guarantees": (guarantee,), "curve": tuple(points)}
    )
    watch = watching.watch_of(bundle)
    assert watch and watch.thresholds.tolist() == [0.7, 0.8, 0.9, 0.95]
    assert watch.alpha == guarantee.alpha
    nothing = guarantee.model_copy(update={"threshold": None, "feasible": False, "reason": "x"})
    assert (
        watching.watch_of(bundle.model_copy(update={"threshold": None, "guarantees": (nothing,)}))
        is None
    )


def test_a_member_hands_on_once_and_goes_on_alone_where_nobody_answers(tmp_path: Path):
    shared, tightened, sent, heard = Agreement(30.0), [], [], []
    auditor = Auditor(None, None, None, busy=lambda: True)  # type: ignore[arg-type]
    away = True

    async def ask(one: Report) -> agreement.Agreed:
        sent.append(one)
        agreed = await shared.exchange(one)
        if away:
            raise TimeoutError  # it was heard, and the answer lost
        return agreed

    member = Member(
        replica="a", bundle="b", fresh=a_watch(), feedback=str(tmp_path),
        breaker=Breaker(Settings()), auditor=auditor,
        tighten=tightened.append, ask=ask, heard=heard.append,
    )  # fmt: skip
    found_out(member, *[WRONG] * 12)

    async def scenario() -> None:
        nonlocal away
        await member.exchange()
        assert tightened == [] and member.failure == "TimeoutError: "
        found_out(member, RIGHT)
        away = False
        await member.exchange()
        await member.exchange()

    asyncio.run(scenario())
    assert tightened == [float("inf")] * 2 and member.failure is None
    assert [agreed.n_replicas for agreed in heard] == [1, 1]
    assert member.last and member.last.n_audits == 13
    assert json.loads((tmp_path / "watch" / "b.json").read_text())["n_audits"] == 13
    assert [len(one.audits) for one in sent] == [12, 12, 1]


def test_audits_of_a_bundle_that_comes_back_to_its_replica_are_heard(tmp_path: Path):
    shared = Agreement(30.0)

    async def scenario() -> Member:
        before, after = (a_member(shared.exchange, None, RIGHT, to=tmp_path) for _ in range(2))
        for _ in range(3):
            await before.exchange()
        await before.leave()
        await after.exchange()
        return after

    last = asyncio.run(scenario()).last
    assert last and last.n_audits == 2


def test_one_that_left_unheard_is_no_other_than_it_was_when_its_bundle_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = Agreement(30.0)

    async def nobody(_: Report) -> agreement.Agreed:
        raise TimeoutError

    async def scenario() -> int:
        before, after = (
            a_member(shared.exchange, Folder(tmp_path).put, RIGHT, to=tmp_path) for _ in range(2)
        )
        await before.exchange()
        before.ask = nobody
        found_out(before, WRONG, RIGHT)
        await before.leave()
        for _ in range(3):
            await after.exchange()
        monkeypatch.setattr(agreement, "GONE_AFTER_S", 0.0)
        await after.exchange()
        assert after.last
        return after.last.n_audits

    assert asyncio.run(scenario()) == 1 + 2 + 1


@pytest.mark.parametrize("killed", [False, True])
def test_last_words_that_cannot_be_deleted_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
):
    """killed: who agrees, as soon as the watch is written."""

    def fails(*_: object) -> None:
        raise SystemError if killed else ClusterError("nothing may be deleted here")

    Folder(tmp_path).put(*watching.last_words("b", "gone", [Outcome(1, WRONG)], 0))
    shared = Agreement(30.0)
    with monkeypatch.context() as patched:
        patched.setattr(watching, "forget_last_words", fails)
        for _ in range(3):
            if killed:
                with pytest.raises(SystemError):
                    exchange(Agreement(30.0), report(tmp_path, batch=0))
            else:
                assert exchange(shared, report(tmp_path, batch=0)).n_audits == 1
    for _ in range(2):
        assert exchange(shared, report(tmp_path, batch=0)).n_audits == 1
    assert not list((tmp_path / "watch" / "b").iterdir())


def test_last_words_that_could_not_be_read_or_kept_are_read_again_and_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = Agreement(30.0)
    exchange(shared, report(tmp_path, RIGHT, replica="goes"), report(tmp_path, batch=0))
    words = [Outcome(101, WRONG), Outcome(102, WRONG)]
    Folder(tmp_path).put(*watching.last_words("b", "goes", words, 0))
    monkeypatch.setattr(agreement, "GONE_AFTER_S", 0.0)

    def fails(*_: object) -> None:
        raise ClusterError("the store cannot be reached")

    for what in ("read_last_words", "store"):
        with monkeypatch.context() as patched:
            patched.setattr(watching, what, fails)
            for _ in range(3):
                with pytest.raises(ClusterError):
                    exchange(shared, report(tmp_path, batch=0))
    assert len(shared._seen["b"]["goes"].audits) == 3
    assert exchange(shared, report(tmp_path, batch=0)).n_audits == 3
    assert exchange(shared, report(tmp_path, batch=0)).n_audits == 3
    assert not list((tmp_path / "watch" / "b").iterdir())


def test_last_words_of_a_replica_of_before_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Batches with numbers, of which the watch has the first."""
    members = {"old": Heard(last=7, n_owed=2)}
    watching.store(Folder(tmp_path), "b", Kept(watch=a_watch().audited(RIGHT), members=members))
    batches = [[7, [[0.95, 0]]], [8, [[0.95, 1], [None, 0]]], [9, [[0.95, 1]]]]
    Folder(tmp_path).put("watch/b/old.json", json.dumps({"batches": batches}).encode())

    def killed(*_: object) -> None:
        raise SystemError

    with monkeypatch.context() as patched, pytest.raises(SystemError):
        patched.setattr(watching, "forget_last_words", killed)
        exchange(Agreement(30.0), report(tmp_path, batch=0))
    shared = Agreement(30.0)
    for _ in range(2):
        assert exchange(shared, report(tmp_path, batch=0)).n_audits == 4
    assert not list((tmp_path / "watch" / "b").iterdir())
    kept, expected = watching.stored(Folder(tmp_path), "b"), a_watch()
    for audit in (RIGHT, WRONG, watching.UNANSWERED, WRONG):
        expected = expected.audited(audit)
    assert kept and kept.watch.log_detectors == pytest.approx(expected.log_detectors)


def test_of_many_that_are_gone_each_is_offered_and_first_those_that_owe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after a restart, with the names of a day, to the one that lives."""
    members = {str(i): Heard(last=5, n_owed=int(i >= 15)) for i in range(20)}
    watching.store(Folder(tmp_path), "b", Kept(watch=a_watch(), members=members))
    shared, now = Agreement(30.0), time.monotonic()
    lives, offered = replace(report(tmp_path, replica="lives"), takes_up=True), []
    exchange(shared, lives)
    for second in range(20):
        monkeypatch.setattr(agreement.time, "monotonic", lambda s=second: now + 100.0 + s)
        orphan = exchange(shared, lives).orphan
        assert orphan
        offered.append(orphan.member)
    assert sorted(offered[:5]) == [str(i) for i in range(15, 20)] and len(set(offered)) == 20
