"""Audits on their way to the watch, kept on disk: what a member that is gone leaves to another one.

    <spool>/audits/<bundle>/<member>/<name>.jsonl   of a member that runs, or was killed
    <to>/audits/<bundle>/<member>.jsonl             of one that stopped in order, for any host

They hold texts, as feedback does, and are only where feedback is kept: in its spool, and in the
folder or store that it goes to. Each file is deleted once the watch has the last of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from journeyman.cascade.policy import Decision
from journeyman.cascade.watching import LOST, Outcome
from journeyman.errors import JourneymanError
from journeyman.folder import Folder

_MOST_BYTES = 1 << 20  # of a file, before another one is begun
_KEPT_S = 7 * 86400.0  # what nobody takes up


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiting:
    """An audit without an outcome so far. number: see ``Outcome``; since: when it came; decision:
    the student's, None where it is not known yet; by_teacher: its answer, where that is there,
    worded differently, and waits for the judge."""

    number: int
    text: str
    since: float
    decision: Decision | None
    by_teacher: str | None = None

    @property
    def n_characters(self) -> int:
        said = self.decision.label if self.decision else ""
        return len(self.text) + len(said) + len(self.by_teacher or "")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One of a text that the teacher cannot answer."""

    number: int


Entry = Waiting | Outcome | LeftOut


class Spool:
    """Of one member. An audit is written as it begins to wait, and again whenever it is further.

    Each is one append to a file that is not buffered, at once and without an fsync: it is the
    operating system's then, and outlives the process, though not the power. That takes some 15
    microseconds, and its encoding as many or, of 150 classes, 250, for each of the few texts in a
    hundred that are audited. A thread would save the event loop most of it, and lose what a killed
    process had not written yet: audits, and outcomes for which the teacher were asked again.
    """

    def __init__(self, folder: Path, last_in: Mapping[Path, int] | None = None) -> None:
        """last_in: the highest number in each file that is there."""
        self._folder = folder
        self._last_in = dict(last_in or {})
        self._last = max(self._last_in.values(), default=0)
        self._path: Path | None = None  # of the file that is open
        self._file: io.FileIO | None = None
        self._n_bytes = 0  # in it
        self._pauses = False
        self.failure: str | None = None  # why audits that wait are in memory alone, if so

    @property
    def last(self) -> int:
        """The highest number that came so far, of one that is left out, too."""
        return self._last

    def write(self, one: Entry) -> None:
        """Where the disk has no room for a new one, the whole spool is given up until all that wait
        can be written anew, or the watch has what came so far: with a gap it would be worth less
        than none."""
        is_new, self._last = one.number > self._last, max(self._last, one.number)
        if self._pauses:
            return
        try:
            self._append(one)
            self.failure = None
        except OSError as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._close()  # behind the piece of a line
            if is_new:
                self._pauses = True
                self.drop()

    @property
    def pauses(self) -> bool:
        """Whether it was given up, see ``write``."""
        return self._pauses

    def resume(self, entries: Sequence[Entry]) -> None:
        """With all that are behind the last that counted, if there is room by now."""
        try:
            for one in entries:
                self._append(one)
        except OSError as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._close()
            self.drop()
        else:
            self._pauses, self.failure = False, None

    def counted(self, last: int) -> None:
        """Up to this number all are in the watch, so that nobody needs them any more."""
        for path, last_there in list(self._last_in.items()):
            if last_there <= last:
                self._delete(path)
        self._remove_folder()
        if self._pauses and last >= self._last:
            self._pauses, self.failure = False, None

    def drop(self) -> None:
        """Delete what is there."""
        for path in list(self._last_in):
            self._delete(path)
        self._remove_folder()

    def _append(self, one: Entry) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path = self._folder / f"{uuid.uuid4().hex}.jsonl"
            self._file, self._n_bytes = self._path.open("ab", buffering=0), 0
        assert self._path is not None
        self._last_in[self._path] = max(self._last_in.get(self._path, 0), one.number)
        line = _line(one)
        self._n_bytes += len(line)
        while line:  # a file that is not buffered may take less
            line = line[self._file.write(line) :]
        if self._n_bytes >= _MOST_BYTES:
            self._close()

    def _delete(self, path: Path) -> None:
        if path == self._path:
            self._close()
        with contextlib.suppress(OSError):  # where it was taken up, say
            path.unlink()
        del self._last_in[path]

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._path = None

    def _remove_folder(self) -> None:
        if not self._last_in:
            with contextlib.suppress(OSError):  # it is not there, or has files of another one
                self._folder.rmdir()


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """By a member that is gone. entries: behind the last that counted, in their order; n_stopped:
    of those behind one that is missing."""

    spool: Spool
    entries: Sequence[Waiting | Outcome]
    n_stopped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spools:
    """Of the members of one bundle. spool: the local folder of the feedback; to: where it goes."""

    spool: Path
    to: Folder
    bundle: str

    def of(self, member: str) -> Spool:
        return Spool(self._folder(member))

    def left_by(self, member: str, last: int, n_owed: int) -> Left | None:
        """last: the number of its last audit that counted; n_owed: at least so many are behind it.
        None where nothing is to be read from here; raises OSError, ClusterError."""
        found = {path: _read(path.read_bytes()) for path in self._folder(member).glob("*.jsonl")}
        entries = [one for there in found.values() for one in there]
        with contextlib.suppress(FileNotFoundError):
            entries += _read(self.to.get(self._name(member)))
        if not any(one.number > last for one in entries):
            return None
        last_in = {path: max((e.number for e in es), default=0) for path, es in found.items()}
        spool = Spool(self._folder(member), last_in)
        furthest = _furthest(entries, last)
        series = _series(furthest, last)
        n_missing = n_owed - len(series)
        n_stopped = max(len(furthest) - len(series), n_missing - 1, 0)
        if n_stopped or n_missing > 0:
            series.append(Outcome(last + len(series) + 1, LOST))
        known = [one for one in series if not isinstance(one, LeftOut)]
        return Left(spool=spool, entries=known, n_stopped=n_stopped)

    def handed_on(self, member: str, entries: Iterable[Entry]) -> tuple[str, bytes]:
        """Name and content of a file from which any host can take them up."""
        return self._name(member), b"".join(_line(one) for one in entries)

    def forget(self, member: str) -> None:
        """What it handed on; raises ClusterError."""
        forget_handed_on(self.to, self.bundle, member)

    def clean(self) -> None:
        """Delete what nobody took up: of killed members here, and what was handed on."""
        with contextlib.suppress(OSError):  # as where one that lives deletes its folder meanwhile
            for path in self.spool.glob("audits/*/*/*.jsonl"):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < time.time() - _KEPT_S:
                        path.unlink()
                        path.parent.rmdir()
        with contextlib.suppress(JourneymanError):
            for one in self.to.walk("audits"):
                is_handed_on = one.name.count("/") == 2  # not in a spool that lies there, too
                if is_handed_on and one.modified.timestamp() < time.time() - _KEPT_S:
                    self.to.delete(one.name)

    def _folder(self, member: str) -> Path:
        return self.spool / "audits" / self.bundle / member

    def _name(self, member: str) -> str:
        return _handed_on(self.bundle, member)


def forget_handed_on(to: Folder, bundle: str, member: str) -> None:
    """Raises ClusterError."""
    to.delete(_handed_on(bundle, member))


def _handed_on(bundle: str, member: str) -> str:
    return f"audits/{bundle}/{member}.jsonl"


def whole(entries: Sequence[Entry], last_heard: int, last: int) -> list[Entry]:
    """With those that are left out, of which a queue knows nothing any more: all that are missing
    behind the last that was heard, up to the last that came. Else who reads them would take the
    first of these for a lost one."""
    there = {one.number: one for one in entries}
    numbers = range(last_heard + 1, max([*there, last]) + 1)
    return [there.get(number, LeftOut(number)) for number in numbers]


def _furthest(entries: Iterable[Entry], last: int) -> list[Entry]:
    """In their order; of several of one audit the one that is furthest."""
    found: dict[int, Entry] = {}
    for one in entries:
        there = found.get(one.number)
        if one.number > last and (there is None or _progress(one) > _progress(there)):
            found[one.number] = one
    return [found[number] for number in sorted(found)]


def _series(entries: Sequence[Entry], last: int) -> list[Entry]:
    """Up to the first that is missing. It counts as an error, and those behind it are left out: see
    ``watching.Kept``."""
    return [one for place, one in enumerate(entries, last + 1) if one.number == place]


def _progress(one: Entry) -> int:
    if isinstance(one, Waiting):
        return int(one.by_teacher is not None)
    return 2


def _line(one: Entry) -> bytes:
    """Of ASCII alone, as a text may hold half of a character."""
    content: dict[str, Any]
    if isinstance(one, Outcome):
        content = {"outcome": one.written()}
    elif isinstance(one, LeftOut):
        content = {"left_out": one.number}
    else:
        content = {"number": one.number, "text": one.text, "by_teacher": one.by_teacher}
        content["decision"] = (
            None
            if one.decision is None
            else {
                "label": one.decision.label,
                "confidence": one.decision.confidence,
                "probabilities": one.decision.probabilities.tolist(),
            }
        )
    return json.dumps(content).encode() + b"\n"


def _read(content: bytes) -> list[Entry]:
    """Whole lines; one that was cut short, by a kill or a full disk, is none."""
    entries = []
    for line in content.splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entries += [_entry(json.loads(line))] if line.endswith(b"\n") else []
    return entries


def _entry(content: dict[str, Any]) -> Entry:
    if "outcome" in content:
        return Outcome.read(content["outcome"])
    if "left_out" in content:
        return LeftOut(content["left_out"])
    decision = content["decision"]
    return Waiting(
        number=content["number"],
        text=content["text"],
        since=0.0,
        decision=decision
        and Decision(
            answered_by="student",
            label=decision["label"],
            confidence=decision["confidence"],
            probabilities=np.array(decision["probabilities"], dtype=np.float64),
        ),
        by_teacher=content["by_teacher"],
    )
