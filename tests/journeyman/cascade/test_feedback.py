"""What is kept of the traffic, in which split, and that a killed replica loses nothing of it."""

import asyncio
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from journeyman.cascade.answering import Answers, Cascade, Unlabeled
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.drift import Audit
from journeyman.cascade.feedback import Journal, Seen, worth_keeping
from journeyman.cascade.policy import Decision, Escalation, Policy
from journeyman.cascade.recording import Recording
from journeyman.cascade.refusals import Refusal, TeacherUnavailable, TextRefused
from journeyman.cascade.remembering import Remembering
from journeyman.certify.calibration import Calibrator
from journeyman.certify.confidence import Confidence
from journeyman.errors import ClusterError
from journeyman.folder import Folder
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels


def decision(by: str = "student") -> Decision:
    return Decision(
        answered_by=by,  # type: ignore[arg-type]
        label="yes",
        confidence=0.7,
        probabilities=np.array([0.3, 0.7]),
    )


def seen(text: str = "a", split: str = "train") -> Seen:
    return Seen(
        text=text,
        split=split,
        escalated=True,
        propensity=0.9,
        label="yes",
        answered_by="teacher",
        confidence=0.25,
        probabilities=[0.25, 0.75],
        bundle="b",
        received_at=1_800_000_000.5,
    )


def read(folder: Path) -> list[dict]:
    tables = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))]
    return [row for table in tables for row in table]


def test_audited_texts_certify_escalated_ones_train_and_the_rest_is_forgotten():
    rows = worth_keeping(
        ["a", "b", "c", "d"],
        [decision(), decision("teacher"), decision("teacher"), decision()],
        escalated=frozenset({1, 2}),
        audited=[False, True, False, True],
        audit_rate=0.1,
        bundle="b",
        now=1.0,
    )
    assert [(r.text, r.split, r.escalated, r.propensity) for r in rows] == [
        ("b", "certify", True, 0.1),
        ("c", "train", True, 0.9),
        ("d", "certify", False, 0.1),
    ]
    assert [r.answered_by for r in rows] == ["teacher", "teacher", "student"]


def test_rows_are_rolled_by_number_and_at_the_end(tmp_path: Path):
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=3, roll_s=60)
    for i in range(7):
        journal.add([seen(str(i))])
    journal.close()
    assert sorted(row["text"] for row in read(tmp_path)) == list("0123456")
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    assert not list((tmp_path / "open").iterdir())
    row = read(tmp_path)[0]
    assert row["received_at"].timestamp() == 1_800_000_000.5
    assert row["probabilities"] == [0.25, 0.75] and row["split"] == "train"


def test_rows_are_rolled_after_a_while(tmp_path: Path):
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=1000, roll_s=0.1)
    journal.add([seen()])
    deadline = time.monotonic() + 10
    while not read(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    journal.close()
    assert len(read(tmp_path)) == 1


def test_a_store_that_is_away_keeps_rows_in_the_spool_until_it_is_back(tmp_path: Path):
    stored: dict[str, bytes] = {}
    away = True

    def put(name: str, content: bytes) -> None:
        if away:
            raise ClusterError("the store cannot be reached")
        stored[name] = content

    journal = Journal(tmp_path, put, roll_rows=1, roll_s=60)
    for i in range(3):
        journal.add([seen(str(i))])
    deadline = time.monotonic() + 10
    while journal.failure is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    away = False
    journal.add([seen("3")])
    journal.close()
    texts = {row["text"] for content in stored.values()
             for row in pq.read_table(io.BytesIO(content)).to_pylist()}  # fmt: skip
    assert texts == set("0123") and journal.failure is None


def test_a_store_that_was_away_is_tried_again_without_a_further_row(tmp_path: Path):
    n_tried = 0

    def put(name: str, content: bytes) -> None:
        nonlocal n_tried
        n_tried += 1
        if n_tried < 3:
            raise ClusterError("the store cannot be reached")
        Folder(tmp_path).put(name, content)

    journal = Journal(tmp_path / "spool", put, roll_rows=1, roll_s=0.05)
    journal.add([seen()])
    until(lambda: len(read(tmp_path)) == 1)
    assert journal.failure is None
    journal.close()
    assert n_tried == 3


def test_a_store_that_does_not_answer_keeps_no_row_from_the_spool(tmp_path: Path):
    asked, answers = threading.Event(), threading.Event()

    def put(name: str, content: bytes) -> None:
        asked.set()
        answers.wait()
        Folder(tmp_path).put(name, content)

    journal = Journal(tmp_path / "spool", put, roll_rows=1, roll_s=60)
    journal.add([seen("0")])
    assert asked.wait(10)
    for i in range(1, 5):
        journal.add([seen(str(i))])
    spool = tmp_path / "spool" / "open"
    until(
        lambda: len(list(spool.iterdir())) == 5 and all(p.stat().st_size for p in spool.iterdir())
    )
    answers.set()
    journal.close()
    assert sorted(row["text"] for row in read(tmp_path)) == list("01234")
    assert not list(spool.iterdir())


ENDS = """
import json, os, sys
from pathlib import Path
from journeyman.cascade.feedback import Journal, Seen
from journeyman.folder import Folder

def put(name, content):
    if sys.argv[4] == "stored":
        Folder(sys.argv[1]).put(name, content)
    os._exit(9)

journal = Journal(Path(sys.argv[2]), put, roll_rows=3, roll_s=600)
for i in range(3):
    journal.add([Seen(**json.loads(sys.argv[3]) | {"text": str(i)})])
journal.close()
"""


@pytest.mark.parametrize("when", ["before", "stored"])
def test_a_replica_that_ends_before_or_behind_an_upload_loses_no_row_and_writes_none_twice(
    when: str, tmp_path: Path
):
    store, spool = tmp_path / "store", tmp_path / "spool"
    fields = json.dumps({name: getattr(seen(), name) for name in Seen.__slots__})
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, str(store), str(spool), fields, when], check=False
    )
    assert ended.returncode == 9 and len(list((spool / "open").iterdir())) == 1
    assert len(read(store)) == (3 if when == "stored" else 0)
    Journal(spool, Folder(store).put, roll_rows=10, roll_s=60).close()
    assert [row["text"] for row in read(store)] == ["0", "1", "2"]
    assert not list((spool / "open").iterdir())


def test_a_process_that_has_the_number_of_one_that_is_gone_keeps_nothing_of_its_rows(
    tmp_path: Path,
):
    """Where a container starts again, numbers do so, too."""
    fields = {name: getattr(seen(), name) for name in Seen.__slots__}
    (tmp_path / "open").mkdir()
    left = tmp_path / "open" / f"{socket.gethostname()}.{os.getpid()}-17.abc-def.jsonl"
    left.write_text(json.dumps(fields) + "\n")
    Journal(tmp_path, Folder(tmp_path).put, roll_rows=10, roll_s=60).close()
    assert len(read(tmp_path)) == 1 and not left.exists()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


WRITER = """
import json, sys, time
from pathlib import Path
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.drift import Audit
from journeyman.cascade.feedback import Journal, Seen
journal = Journal(Path(sys.argv[1]), lambda *_: None, roll_rows=10**6, roll_s=600)
fields = json.loads(sys.argv[2])
for i in range(10**6):
    journal.add([Seen(**fields | {"text": str(i)})])
    if i == 200:
        print("go", flush=True)
    time.sleep(0.0005)
"""


def test_what_a_killed_replica_wrote_is_rolled_by_the_next_one(tmp_path: Path):
    fields = {name: getattr(seen(), name) for name in Seen.__slots__}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), json.dumps(fields)], stdout=subprocess.PIPE
    )
    assert writer.stdout
    assert writer.stdout.readline() == b"go\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    Journal(tmp_path, Folder(tmp_path).put, roll_rows=10, roll_s=60).close()
    texts = [int(row["text"]) for row in read(tmp_path)]
    assert texts == list(range(len(texts))) and len(texts) >= 190
    assert not list((tmp_path / "open").iterdir())


def test_the_file_of_a_replica_that_runs_is_left_alone(tmp_path: Path):
    fields = {name: getattr(seen(), name) for name in Seen.__slots__}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), json.dumps(fields)], stdout=subprocess.PIPE
    )
    assert writer.stdout
    writer.stdout.readline()
    try:
        Journal(tmp_path, Folder(tmp_path).put, roll_rows=10, roll_s=60).close()
        assert not read(tmp_path) and len(list((tmp_path / "open").iterdir())) == 1
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_coin_that_always_falls_on_one_side(rate: float):
    rows = worth_keeping(["a"], [decision()], frozenset(), [rate == 1.0], rate, "b", 0.0)
    assert [r.propensity for r in rows] == [1.0] * int(rate)


class Answering:
    """The student answers a, the teacher b, the student in its place c."""

    async def answer(self, texts: list[str], asked: str = "cascade") -> Answers:
        decisions = tuple(decision("teacher" if t == "b" else "student") for t in texts)
        return Answers(
            decisions=decisions,
            teacher_prompt_tokens=0,
            teacher_output_tokens=0,
            void=frozenset(i for i, t in enumerate(texts) if t == "c"),
        )


def test_traffic_is_recorded_with_the_audits_rate_and_all_that_was_escalated(tmp_path: Path):
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10**6, roll_s=600)
    recording = Recording(Answering(), journal, 0.2, "b", random.Random(0))

    async def ask() -> None:
        for _ in range(500):
            await recording.answer(["a", "b", "c"])
            await recording.answer(["b"], "teacher")  # no traffic

    asyncio.run(ask())
    journal.close()
    rows = read(tmp_path)
    train = [row["text"] for row in rows if row["split"] == "train"]
    audited = [row["text"] for row in rows if row["split"] == "certify"]
    assert set(train) == {"b", "c"} and len(train) + len(audited) == 1000 + audited.count("a")
    assert {text: binomtest(audited.count(text), 500, 0.2).pvalue > 0.001 for text in "abc"} == (
        dict.fromkeys("abc", True)
    )
    assert {(row["split"], row["propensity"]) for row in rows} == {("train", 0.8), ("certify", 0.2)}


def test_the_watch_sees_requests_that_were_refused_or_answered_in_the_teachers_place(
    tmp_path: Path,
):
    """Without them the accepted ones would be too many among its audits."""

    class Failing:
        def __init__(self, degrades: bool) -> None:
            self.degrades = degrades

        async def answer(self, texts: list[str], asked: str = "cascade") -> Answers:
            if self.degrades:
                return Answers(decisions=(decision("student"),) * 2, void=frozenset({1}))
            refusal = TeacherUnavailable("away")
            refusal.decided = [decision("student"), Escalation(student=decision("student"))]
            raise refusal

    async def seen(degrades: bool) -> tuple[int, list[int]]:
        auditor = Auditor(None, None, None, busy=lambda: True)  # type: ignore[arg-type]
        journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10**6, roll_s=600)
        recording = Recording(Failing(degrades), journal, 1.0, "b", auditor=auditor)
        with contextlib.suppress(TeacherUnavailable):
            await recording.answer(["accepted", "escalated"])
        journal.close()
        pending = auditor.n_pending
        auditor._settle(Audit(score=0.5, loss=1))
        return pending, [one.audit.loss for one in auditor.outcomes()]

    for degrades in (True, False):
        assert asyncio.run(seen(degrades)) == (1, [1, 0])


@pytest.mark.parametrize("why", [TeacherUnavailable("away"), TextRefused(0, "too long")])
def test_what_was_escalated_is_kept_where_the_teacher_did_not_answer_it(
    why: TeacherUnavailable | TextRefused, tmp_path: Path
):
    """As bad times are those in which there is most of it. Not what the teacher can never answer:
    it would be labeled in vain; nor what the student had answered, or not decided yet."""
    student = decision("student")

    class Refusing:
        async def answer(self, texts: list[str], asked: str = "cascade") -> Answers:
            if texts != ["undecided"]:
                unsure = Escalation(student=student)
                why.decided = [unsure, student, unsure, Escalation(student=None)]
                if isinstance(why, TextRefused):
                    why.unlabeled = frozenset({0})
                raise why
            raise TeacherUnavailable("away")

    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10**6, roll_s=600)
    recording = Recording(Refusing(), journal, 0.2, "b", random.Random(0))

    async def ask() -> None:
        for texts in 100 * [["refused", "sure", "unsure", "no answer"], ["undecided"]]:
            with pytest.raises((TeacherUnavailable, TextRefused)):
                await recording.answer(texts)

    asyncio.run(ask())
    journal.close()
    rows = read(tmp_path)
    kept = Counter(row["text"] for row in rows)
    train = {(row["text"], row["escalated"], row["propensity"], row["answered_by"],
              row["confidence"]) for row in rows if row["split"] == "train"}  # fmt: skip
    expected = {("unsure", True, 0.8, "nobody", student.confidence),
                ("no answer", True, 0.8, "nobody", None)}  # fmt: skip
    if isinstance(why, TeacherUnavailable):
        expected.add(("refused", True, 0.8, "nobody", student.confidence))
    assert train == expected
    assert kept["unsure"] == kept["no answer"] == 100, "each request once"
    assert 0 < kept["sure"] < 50 and 0 < kept["undecided"] < 50, "audits alone"


@pytest.mark.parametrize(
    "why",
    [
        TeacherUnavailable("away"),
        TextRefused(0, "too long"),
        asyncio.CancelledError(),
        RuntimeError("the student failed"),
    ],
)
def test_audits_of_requests_that_were_refused_or_left_are_kept_too(
    why: BaseException, tmp_path: Path
):
    class Refusing:
        async def answer(self, texts: list[str], asked: str = "cascade") -> Answers:
            raise why

    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10**6, roll_s=600)
    auditor = Auditor(None, None, None, busy=lambda: True)  # type: ignore[arg-type]
    recording = Recording(Refusing(), journal, 0.5, "b", random.Random(0), auditor)

    async def ask() -> None:
        for _ in range(100):
            with pytest.raises(type(why)):
                await recording.answer(["a", "b"])

    asyncio.run(ask())
    journal.close()
    rows = read(tmp_path)
    assert 60 < len(rows) < 140
    assert {(row["split"], row["answered_by"]) for row in rows} == {("certify", "nobody")}
    assert auditor.n_pending == len(rows), "and watched: what its student says is asked again"


@pytest.mark.parametrize("why", [None, TeacherUnavailable("away")])
def test_the_watch_leaves_out_texts_outside_of_what_was_certified_whoever_answers(
    why: Refusal | None, tmp_path: Path
):
    class Answering:
        async def answer(self, texts: list[str], asked: str = "cascade") -> Answers:
            if why:
                raise why
            return Answers(decisions=[decision("teacher") for _ in texts])

    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10**6, roll_s=600)
    auditor = Auditor(None, None, None, busy=lambda: True)  # type: ignore[arg-type]
    recording = Recording(
        Answering(), journal, 1.0, "b", auditor=auditor, is_outside=lambda text: len(text) > 3
    )
    with pytest.raises(type(why)) if why else contextlib.nullcontext():
        asyncio.run(recording.answer(["long", "text"]))
    journal.close()
    assert len(read(tmp_path)) == 2, "kept all the same"
    assert (auditor.n_left_out, auditor.n_pending, auditor.n_found) == (2, 0, 0)


def test_of_a_request_that_is_refused_for_one_text_the_watch_sees_the_others(tmp_path: Path):
    """Asked of a cascade that remembers the first: the second cannot be answered by the teacher."""

    class Student:
        async def submit(self, items: list[str]) -> list[Decision | Escalation]:
            return [Escalation(student=decision("student")) if text in "cd"
                    else decision("student") for text in items]  # fmt: skip

    class Teacher:
        async def labels(self, texts: list[str]) -> list[Unlabeled | ClassLabels]:
            return [Unlabeled(reason="too long") if text == "c"
                    else ClassLabels(class_logprobs=np.log([0.5, 0.5]), label_mass=None,
                                     n_prompt_tokens=1, n_output_tokens=1)
                    for text in texts]  # fmt: skip

    confidence = Confidence(calibrator=Calibrator(temperature=1.0), score="margin")
    policy = Policy(label_names=("n", "y"), accept_above=0.5, teacher_log_prior=None,
                    confidence=confidence)  # fmt: skip
    auditor = Auditor(policy, Teacher(), Student(), busy=lambda: True)  # type: ignore[arg-type]
    cascade = Cascade(policy, Student(), Teacher(), Settings())  # type: ignore[arg-type]
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10**6, roll_s=600)
    remembering = Remembering(cascade, 10)
    recording = Recording(remembering, journal, 1.0, "b", auditor=auditor)

    async def ask() -> None:
        await remembering.answer(["a"])
        with pytest.raises(TextRefused, match="text 1: too long"):
            await recording.answer(["a", "c", "b", "d"])

    asyncio.run(ask())
    journal.close()
    assert auditor.n_pending == 2 and auditor.n_left_out == 1
    for _ in range(2):
        auditor._settle(Audit(score=0.5, loss=1))
    assert [one.audit.loss for one in auditor.outcomes()] == [1, 1, 0]
    assert sorted(row["text"] for row in read(tmp_path)) == ["a", "b", "c", "d"]


def test_while_nobody_knows_how_strict_the_rule_is_nothing_is_watched(tmp_path: Path):
    """The teacher answers all then, which says nothing of how often the student is wrong."""
    auditor, held = Auditor(None, None, None, busy=lambda: True), [True]  # type: ignore[arg-type]
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10, roll_s=600)
    recording = Recording(Answering(), journal, 1.0, "b", auditor=auditor, is_held=lambda: held[0])
    asyncio.run(recording.answer(["a", "b"]))
    assert (auditor.n_unkept, auditor.n_not_drawn) == (0, 2)
    held[0] = False
    asyncio.run(recording.answer(["a", "b"]))
    journal.close()
    assert (auditor.n_unkept, auditor.n_not_drawn) == (2, 2) and len(read(tmp_path)) == 4


def test_where_too_many_audits_wait_a_text_is_kept_and_not_watched_whatever_it_is(tmp_path: Path):
    """That is settled with the coin; one that began while there was room is watched."""

    class Full(Auditor):
        has_room = True  # type: ignore[assignment]

    class Filling(Answering):
        async def answer(self, texts: list[str], asked: str = "cascade") -> Answers:
            auditor.has_room = False  # type: ignore[misc]
            return await super().answer(texts, asked)

    auditor = Full(None, None, None, busy=lambda: True)  # type: ignore[arg-type]
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10, roll_s=600)
    recording = Recording(Filling(), journal, 1.0, "b", auditor=auditor)
    for _ in range(3):
        asyncio.run(recording.answer(["a", "b"]))
    journal.close()
    assert (auditor.n_unkept, auditor.n_not_drawn) == (2, 4)
    assert len(read(tmp_path)) == 6


def test_an_audit_of_a_request_on_which_we_failed_is_kept_and_has_an_outcome(tmp_path: Path):
    class Broken:
        async def answer(self, texts: list[str], asked: str = "cascade") -> Answers:
            raise ZeroDivisionError

    auditor = Auditor(None, None, None, busy=lambda: True)  # type: ignore[arg-type]
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10, roll_s=600)
    recording = Recording(Broken(), journal, 1.0, "b", auditor=auditor)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(recording.answer(["a", "b"]))
    journal.close()
    assert auditor.n_pending == 2
    assert [(row["text"], row["answered_by"]) for row in read(tmp_path)] == [
        ("a", "nobody"), ("b", "nobody"),
    ]  # fmt: skip


def test_rows_for_which_the_disk_has_no_room_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Journal, "_new_file", lambda _: io.FileIO("/dev/full", "ab"))
    journal = Journal(tmp_path, Folder(tmp_path).put, roll_rows=10, roll_s=600)
    journal.add([seen("a"), seen("b")])
    journal.close()
    assert journal.n_lost == 2
