"""Audits that wait outlive their process, and are read in their order by who goes on for it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from journeyman.cascade import spooling
from journeyman.cascade.drift import Audit
from journeyman.cascade.policy import Decision
from journeyman.cascade.spooling import LeftOut, Spool, Spools, Waiting
from journeyman.cascade.watching import LOST, UNANSWERED, Outcome
from journeyman.folder import Folder

RIGHT = Audit(score=0.8, loss=0)


def waiting(number: int, text: str = "a text", by_teacher: str | None = None) -> Waiting:
    said = Decision(
        answered_by="student", label="yes", confidence=0.8, probabilities=np.array([0.1, 0.9])
    )
    return Waiting(number=number, text=text, since=5.0, decision=said, by_teacher=by_teacher)


def spools(tmp_path: Path) -> Spools:
    return Spools(spool=tmp_path / "spool", to=Folder(tmp_path / "to"), bundle="b")


def numbers(of: Spools, last: int = 0) -> list[int]:
    left = of.left_by("m", last, 0)
    return [one.number for one in left.entries] if left else []


def test_what_asking_takes_is_read_as_it_was_written(tmp_path: Path):
    spool = spools(tmp_path).of("m")
    text = "two\nlines, \u2028 and half a character \ud83d"
    undecided = Waiting(number=2, text="u", since=0.0, decision=None)
    for one in (waiting(1, text), undecided, Outcome(3, UNANSWERED), waiting(4, by_teacher="no")):
        spool.write(one)
    left = spools(tmp_path).left_by("m", 0, 0)
    assert left
    first, second, third, fourth = left.entries
    assert isinstance(first, Waiting) and first.decision and first.text == text
    assert (first.decision.label, first.decision.confidence) == ("yes", 0.8)
    assert first.decision.probabilities.tolist() == [0.1, 0.9]
    assert isinstance(second, Waiting) and second.decision is None
    assert third == Outcome(3, UNANSWERED)
    assert isinstance(fourth, Waiting) and fourth.by_teacher == "no"


def test_of_each_audit_the_furthest_is_left_and_none_that_counted(tmp_path: Path):
    spool = spools(tmp_path).of("m")
    for number in range(1, 7):
        spool.write(waiting(number))
    spool.write(Outcome(3, RIGHT))
    spool.write(LeftOut(4))
    spool.write(waiting(5, by_teacher="no"))
    spool.write(waiting(3))  # by one that was slow
    left = spools(tmp_path).left_by("m", 2, 0)
    assert left and left.n_stopped == 0
    judged = left.entries[1]
    assert left.entries[0] == Outcome(3, RIGHT)
    assert isinstance(judged, Waiting) and judged.by_teacher == "no"
    assert numbers(spools(tmp_path), 2) == [3, 5, 6]
    assert (
        spools(tmp_path).left_by("m", 6, 0) is None and spools(tmp_path).left_by("x", 0, 0) is None
    )


def test_files_are_deleted_as_soon_as_all_that_is_in_them_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(spooling, "_MOST_BYTES", 400)
    of = spools(tmp_path)
    spool = of.of("m")
    for number in range(1, 21):
        spool.write(waiting(number))
    before = len(list((tmp_path / "spool").rglob("*.jsonl")))
    spool.counted(10)
    assert before >= 5 and len(list((tmp_path / "spool").rglob("*.jsonl"))) < before * 0.7
    assert numbers(of, 10) == list(range(11, 21))
    spool.counted(20)
    assert not list((tmp_path / "spool" / "audits" / "b").iterdir())
    spool.write(waiting(21))
    assert numbers(of, 20) == [21]


def test_one_that_is_missing_counts_as_an_error_and_those_behind_it_are_left_out(tmp_path: Path):
    spool = spools(tmp_path).of("m")
    for number in (4, 5, 7, 8):
        spool.write(waiting(number))
    left = spools(tmp_path).left_by("m", 3, 0)
    assert left and left.entries[2] == Outcome(6, LOST)
    assert (len(left.entries), left.n_stopped) == (3, 2)


def test_of_those_that_are_owed_the_first_that_is_not_there_counts_as_an_error(tmp_path: Path):
    spool = spools(tmp_path).of("m")
    for number in (4, 5):
        spool.write(waiting(number))
    spool.write(LeftOut(6))

    def left(n_owed: int) -> tuple[list[int], int]:
        left = spools(tmp_path).left_by("m", 3, n_owed)
        assert left
        return [one.number for one in left.entries], left.n_stopped

    assert left(3) == ([4, 5], 0)
    assert left(4) == ([4, 5, 7], 0)
    assert left(9) == ([4, 5, 7], 5)
    spool.write(waiting(8))
    assert left(3) == ([4, 5, 7], 1)
    assert left(9) == ([4, 5, 7], 5)


def test_a_line_that_was_cut_short_is_none(tmp_path: Path):
    spool = spools(tmp_path).of("m")
    for number in (1, 2):
        spool.write(waiting(number))
    (file,) = (tmp_path / "spool").rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-5])
    assert numbers(spools(tmp_path)) == [1]


@contextlib.contextmanager
def full_disk(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        spool._close()
        patched.setattr(Path, "open", lambda *_, **__: io.FileIO("/dev/full", "ab"))
        yield


def test_without_room_on_the_disk_nothing_is_left_until_all_of_that_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A series with a gap would be read as one without it."""
    spool = spools(tmp_path).of("m")
    spool.write(waiting(1))
    with full_disk(spool, monkeypatch):
        spool.write(waiting(2))
    spool.write(waiting(3))
    assert spool.failure and "No space" in spool.failure
    assert numbers(spools(tmp_path)) == []
    spool.counted(3)
    spool.write(waiting(4))
    assert spool.failure is None and numbers(spools(tmp_path), 3) == [4]


def test_an_outcome_for_which_the_disk_has_no_room_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spool = spools(tmp_path).of("m")
    spool.write(waiting(1))
    with full_disk(spool, monkeypatch):
        spool.write(Outcome(1, RIGHT))
    spool.write(waiting(2))
    assert numbers(spools(tmp_path)) == [1, 2]


def test_what_nobody_took_up_in_a_week_is_deleted(tmp_path: Path):
    of = spools(tmp_path)
    of.of("m").write(waiting(1))
    of.of("n").write(waiting(1))
    (old,) = (tmp_path / "spool" / "audits" / "b" / "m").iterdir()
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    of.clean()
    assert [path.name for path in (tmp_path / "spool" / "audits" / "b").iterdir()] == ["n"]


def test_what_was_handed_on_is_deleted_after_a_week_and_no_spool_beside_it(tmp_path: Path):
    of = Spools(spool=tmp_path, to=Folder(tmp_path), bundle="b")
    of.of("m").write(waiting(1))
    for member in ("old", "new"):
        of.to.put(*of.handed_on(member, [waiting(1)]))
    os.utime(tmp_path / "audits" / "b" / "old.jsonl", (time.time() - 8 * 86400,) * 2)
    of.clean()
    there = {path.name for path in (tmp_path / "audits" / "b").iterdir()}
    assert there == {"m", "new.jsonl"} and list((tmp_path / "audits" / "b" / "m").iterdir())


def test_a_folder_that_vanishes_while_they_are_listed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As Python 3.11 raises then."""

    def glob(*_: object) -> Iterator[Path]:
        yield tmp_path / "none"
        raise FileNotFoundError("of one that lives")

    monkeypatch.setattr(Path, "glob", glob)
    spools(tmp_path).clean()


WRITER = """
import sys
from pathlib import Path
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.spooling import Spool
auditor = Auditor(None, None, None, busy=lambda: True, spool=Spool(Path(sys.argv[1])))
for i in range(10**6):
    auditor.undecided(f"text {i} " * 100)
    if i == 2000:
        print("go", flush=True)
"""


def test_a_killed_process_leaves_all_that_waited(tmp_path: Path):
    folder = tmp_path / "spool" / "audits" / "b" / "m"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
    assert writer.stdout and writer.stdout.readline() == b"go\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    left = spools(tmp_path).left_by("m", 0, 0)
    assert left and left.n_stopped == 0 and len(left.entries) >= 2000
    assert [one.number for one in left.entries] == list(range(1, len(left.entries) + 1))
