"""What the cascade escalates, and a random audit of all it is asked: the next corpus to label.

    <spool>/open/<host>.<process>.<name>.jsonl     rows of a replica that runs, one a line
    <spool>/open/<host>.<process>.<name>.file      another file of its, for where the others go
    <to>/<UTC time>-<name>.parquet                 rows, rolled every so often: of a corpus, and
                                                   where the teacher answered of a label dataset

A line is with the operating system before the next request is read, so that a replica that is
killed loses nothing; what dead replicas left is rolled by others of the same host. With the host
go the rows that are not rolled yet, where the spool is no folder that others have, too.
The coin of an audit is tossed before anything is known of the text. Audited rows go to ``certify``,
never to ``train``: they are a fair sample of the traffic and so can carry the next certificate,
which audits of accepted answers alone cannot (broken in .70 against .08 of simulated draws).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.cascade.policy import Decision, Escalation
from journeyman.labels import schema
from journeyman.teacher.answers import ClassLabels

if TYPE_CHECKING:
    import pyarrow as pa

_OPEN = "open"
_OF_ROWS = ("id", "split", "gold", "label")  # columns of labels that are the corpus's


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One text of the traffic, as it is kept.

    split: ``certify`` of audited texts, ``train`` of escalated ones; propensity: the probability
    with which a text like this one gets into its split; answered_by: student, teacher, or nobody
    where the request was refused; received_at: seconds since 1970; labels: what the teacher said
    over classes, by column of a label dataset, and asked: how it was asked, by which that may be
    copied there (``labels.taught.how_asked``).
    """

    text: str
    split: str
    escalated: bool
    propensity: float
    label: str
    answered_by: str
    confidence: float | None
    probabilities: list[float]
    bundle: str
    received_at: float
    asked: str | None = None
    labels: dict[str, Any] | None = None


def worth_keeping(
    texts: Sequence[str],
    decisions: Sequence[Decision],
    escalated: frozenset[int],
    audited: Sequence[bool],
    audit_rate: float,
    bundle: str,
    now: float,
    asked: str | None = None,
) -> list[Seen]:
    """Of one answered request: what was audited or escalated. asked: how the teacher is."""
    return [
        Seen(
            text=text,
            split="certify" if audited[i] else "train",
            escalated=i in escalated,
            propensity=audit_rate if audited[i] else 1.0 - audit_rate,
            label=decision.label,
            answered_by=decision.answered_by,
            confidence=decision.confidence,
            probabilities=decision.probabilities.tolist(),
            bundle=bundle,
            received_at=now,
            asked=asked if decision.said else None,
            labels=_labels(decision.said) if asked and decision.said else None,
        )
        for i, (text, decision) in enumerate(zip(texts, decisions, strict=True))
        if audited[i] or i in escalated
    ]


def _labels(said: ClassLabels) -> dict[str, Any]:
    values = schema.record(dict.fromkeys(_OF_ROWS), said, None)
    logprobs = said.class_logprobs.astype(np.float32).tolist()
    return {n: v for n, v in values.items() if n not in _OF_ROWS} | {"class_logprobs": logprobs}


def unanswered(
    texts: Sequence[str],
    decided: Sequence[Decision | Escalation],
    unlabeled: frozenset[int],
    audited: Sequence[bool],
    audit_rate: float,
    bundle: str,
    now: float,
) -> list[Seen]:
    """Of a request that was refused, or left by its client: what was audited or escalated. Without
    these audits those of bad times and those with long answers would be missing, and the sample
    were fair no more; without these escalations, most of what is hard for the student where the
    teacher is away or has too much to do. A client that asks again is a request more, as any other.

    decided: by the student, empty where it had not yet; unlabeled: places of texts that the teacher
    can never answer, from which nobody can learn.
    """
    rows = []
    for i, text in enumerate(texts):
        decision = decided[i] if decided else None
        student = decision.student if isinstance(decision, Escalation) else None
        escalated = isinstance(decision, Escalation)
        if not (audited[i] or (escalated and i not in unlabeled)):
            continue
        rows.append(
            Seen(
                text=text,
                split="certify" if audited[i] else "train",
                escalated=escalated,
                propensity=audit_rate if audited[i] else 1.0 - audit_rate,
                label="",
                answered_by="nobody",
                confidence=student.confidence if student else None,
                probabilities=[],
                bundle=bundle,
                received_at=now,
            )
        )
    return rows


class Journal:
    """Takes rows at once and writes them in a thread of its own; another one stores them.

    put: stores one finished file under its name, anywhere; raises OSError or JourneymanError, and
    is then tried again with the next roll, or after roll_s.
    """

    def __init__(
        self, spool: Path, put: Callable[[str, bytes], object], roll_rows: int, roll_s: float
    ) -> None:
        """spool: a local folder for what is not rolled yet."""
        self._put, self._roll_rows, self._roll_s = put, roll_rows, roll_s
        self._open = spool / _OPEN
        self._open.mkdir(parents=True, exist_ok=True)
        self._name = uuid.uuid4().hex[:8]
        self._queue: queue.SimpleQueue[list[Seen] | None] = queue.SimpleQueue()
        self._rows = 0
        self._since = 0.0  # the first of them
        self._unwritten: str | None = None
        self._unstored: str | None = None
        self.n_lost = 0  # rows that no disk had room for
        self._file: io.FileIO | None = None  # open while it has rows
        self._writing: Path | None = None  # it
        self._finished, self._ended = threading.Event(), False
        works = {"feedback": self._write_all, "feedback-rolling": self._roll_all}
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True) for name, work in works.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def failure(self) -> str | None:
        """Why rows wait in the spool, or did not get there, if so."""
        return self._unwritten or self._unstored

    def add(self, rows: list[Seen]) -> None:
        if rows:
            self._queue.put(rows)

    def keep(self, name: str, content: bytes) -> None:
        """Store a file by this name, at once or with a later roll; blocks while it is written."""
        path = self._path(".file")
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(name.encode() + b"\n" + content)
        unfinished.replace(path)
        self._finished.set()

    def close(self) -> None:
        """Write and roll all that was added, and store what was kept."""
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _write_all(self) -> None:
        while (rows := self._next()) is not None:
            try:
                self._write(rows)
            except OSError as error:  # a full disk: these rows are lost, later ones need not be
                self._unwritten = f"{type(error).__name__}: {error}"
                self.n_lost += len(rows)
                self._finish()
                continue
            late = time.monotonic() >= self._since + self._roll_s
            if self._rows >= self._roll_rows or (self._rows and late):
                self._finish()
        self._finish()
        self._ended = True
        self._finished.set()

    def _next(self) -> list[Seen] | None:
        """Rows to write; none where those that are written are due, None at the end."""
        due_s = max(0.0, self._since + self._roll_s - time.monotonic()) if self._rows else None
        try:
            return self._queue.get(timeout=due_s)
        except queue.Empty:
            return []

    def _write(self, rows: list[Seen]) -> None:
        if rows and self._file is None:
            self._file, self._since = self._new_file(), time.monotonic()
        for row in rows:
            assert self._file is not None
            line = json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n"
            while line:  # a file that is not buffered may take less
                line = line[self._file.write(line) :]
        self._rows += len(rows)
        self._unwritten = None if rows else self._unwritten

    def _finish(self) -> None:
        """Leave what is written to the other thread."""
        if self._file is not None:
            self._file.close()
        self._file, self._writing, self._rows = None, None, 0
        self._finished.set()

    def _roll_all(self) -> None:
        """A store that does not answer holds up no row on its way to the spool."""
        while True:
            ended = self._ended
            self._roll()
            if ended:
                return
            self._finished.wait(self._roll_s)
            self._finished.clear()

    def _roll(self) -> None:
        """Make Parquet files of what is written, here and by replicas that are gone; what cannot be
        stored stays for the next time."""
        failure = None
        for path in sorted(self._open.glob(f"{socket.gethostname()}.*.jsonl")):
            if path != self._writing and _nobody_writes(path, self._name):
                failure = self._attempt(self._roll_file, path) or failure
        for path in sorted(self._open.glob(f"{socket.gethostname()}.*.file")):
            failure = self._attempt(self._put_file, path) or failure
        self._unstored = failure

    def _attempt(self, work: Callable[[Path], None], path: Path) -> str | None:
        """Why it cannot be stored now."""
        try:
            work(path)
            path.unlink()
        except FileNotFoundError:  # another journal of this host was faster
            pass
        except Exception as error:  # a store that is away must not end the thread
            return f"{type(error).__name__}: {error}"
        return None

    def _put_file(self, path: Path) -> None:
        name, _, content = path.read_bytes().partition(b"\n")
        self._put(name.decode(), content)

    def _roll_file(self, path: Path) -> None:
        """Its name is made of the first row and the name here: rolled twice, after an end between
        storing and deleting, it is one file all the same."""
        if rows := _read(path):
            first = datetime.fromtimestamp(rows[0]["received_at"], UTC)
            self._put(f"{first:%Y%m%dT%H%M%S}-{path.stem.split('.')[-1]}.parquet", _parquet(rows))

    def _path(self, suffix: str) -> Path:
        process = _process(str(os.getpid()))
        name = f"{socket.gethostname()}.{process}.{self._name}-{uuid.uuid4().hex[:8]}"
        return self._open / (name + suffix)

    def _new_file(self) -> io.FileIO:
        self._writing = self._path(".jsonl")
        return self._writing.open("ab", buffering=0)


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows of ``Seen`` as a corpus source."""
    import pyarrow as pa

    columns = pa.schema(
        [
            ("text", pa.string()),
            ("split", pa.string()),
            ("escalated", pa.bool_()),
            ("propensity", pa.float64()),
            ("label", pa.string()),
            ("answered_by", pa.string()),
            ("confidence", pa.float64()),
            ("probabilities", pa.list_(pa.float32())),
            ("bundle", pa.string()),
            ("received_at", pa.timestamp("us", "UTC")),
            ("asked", pa.string()),
            *(f.with_nullable(True) for f in schema.label_schema("classes")
              if f.name not in _OF_ROWS),
        ]
    )  # fmt: skip
    flat = [
        row | (row.get("labels") or {}) | {"received_at": int(row["received_at"] * 1e6)}
        for row in rows
    ]
    return pa.Table.from_pylist(flat, columns)


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table(rows), sink, compression="zstd")
    return sink.getvalue()


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines; one that was cut short, by a kill or a full disk, is none."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            rows += [json.loads(line)] if line.endswith(b"\n") else []
    return rows


def _nobody_writes(path: Path, name: str) -> bool:
    """Whether its process is gone, or it is this journal's own (which has closed it)."""
    process, journal = path.name.split(".")[-3:-1]
    return journal.startswith(f"{name}-") or _process(process.partition("-")[0]) != process


def _process(number: str) -> str | None:
    """Its number and when it started (ticks since the machine did), as numbers are given anew, most
    of all where a container starts again; None where none has it."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    return f"{number}-{stat.rpartition(')')[2].split()[19]}"
