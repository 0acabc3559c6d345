"""Where a training run stands: whole checkpoints, one writer, the loss curve.

Written by rank 0, read by all. Knows files and names, nothing of what a model is. The work folder
is on a disk that all nodes share, or in an object store: then each node has a copy of what it
needs, a checkpoint is written into rank 0's and put into the store behind that, ``state.json``
last, and who may write is looked up every few seconds instead of each time.

    WORK/attempt                 who may write: the newest start of this run, and of its workers
    WORK/training.jsonl          the curve, one record a line
    WORK/live.json               where the run stands, for the driver
    WORK/trackers/               what trackers have been told (``told``)
    WORK/checkpoints/step-N/     state.json, model/ (a Hugging Face folder), optimizer.pt
                                 state.json names each file and its bytes
    ../step-N/model/lora.pt      low-rank matrices, where they are all that is trained
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import files
from journeyman.errors import ClusterError, DataError
from journeyman.folder import Folder
from journeyman.mirror import Mirror, alone
from journeyman.student import told
from journeyman.student.learner import Measured
from journeyman.student.told import Told

LORA = "lora.pt"  # in the place of weights: those that it adds to do not change
_STATE, _OWNER, _LIVE, _CURVE = "state.json", "attempt", "live.json", "training.jsonl"
_STORE_EVERY_S = 5.0  # between two calls of a store that only say or ask how things stand


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Measured):
    """What the student is worth on the calibrate rows, after so many steps."""

    epoch: int  # that the last step belongs to, from 1
    step: int  # optimizer steps done

    @property
    def loss(self) -> float:
        """What ``LOSS`` says of it, nats."""
        found = self.cross_entropy if self.kl is None else self.kl
        assert found is not None
        return found

    def rank(self) -> tuple[float, float]:
        """Higher is better."""
        if self.perplexity is None:
            return self.agreement, -self.loss
        return -self.loss, self.agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a checkpoint remembers besides tensors."""

    step: int
    total_steps: int
    seconds: float  # of training, over all starts
    n_rows: int  # train rows
    evaluations: tuple[Evaluation, ...]
    stopped_early: bool = False  # no better evaluation had come for training.patience of them

    @property
    def finished(self) -> bool:
        return self.stopped_early or self.step == self.total_steps

    @property
    def best(self) -> Evaluation | None:
        """A classifier's highest agreement, of equal ones the lowest KL; of a causal student, whose
        agreement on its first choice says little of what it writes, the lowest KL, or the lowest
        cross-entropy in its place."""
        return max(comparable(self.evaluations), key=Evaluation.rank, default=None)


def comparable(evaluations: Sequence[Evaluation]) -> Sequence[Evaluation]:
    """Those whose loss is of the newest one's kind.

    A run that was begun before draws were measured by cross-entropy has a KL estimated from them in
    its first evaluations, which is lower by the entropy of the draws. What a text's cross-entropy
    was called KL then is the same.
    """
    if not evaluations or evaluations[-1].against != "draws":
        return evaluations
    return [one for one in evaluations if one.against == "draws"]


class Checkpoints:
    """The work folder of one run, held by one attempt at it."""

    def __init__(self, work: Path | Mirror, attempt: str) -> None:
        mirror = work if isinstance(work, Mirror) else Mirror(local=work)
        self._work = mirror.local
        self._store = mirror.url
        self._all = Folder(mirror.url or mirror.local)  # where everyone finds it
        self._attempt = attempt
        self._folder = self._work / "checkpoints"
        self._owned_at = self._said_at = self._asked_at = -math.inf

    @classmethod
    def claim(cls, work: Path | Mirror) -> Checkpoints:
        """Become the work folder's one writer.

        Workers of a killed driver may live on for seconds; what they write from now on is void.
        """
        claimed = cls(work, uuid.uuid4().hex)
        claimed._all.put(_OWNER, claimed._attempt.encode())
        return claimed

    def restarted(self) -> Checkpoints:
        """Become the one writer in place of earlier workers of the same driver.

        A worker of a lost node may live on, too. Raises ClusterError if another driver has claimed
        the folder since.
        """
        driver = self._attempt.partition(".")[0]
        if self._owner().partition(".")[0] != driver:
            raise self._taken_over()
        mine = f"{driver}.{uuid.uuid4().hex}"
        self._all.put(_OWNER, mine.encode())
        return Checkpoints(Mirror(local=self._work, url=self._store), mine)

    @property
    def work(self) -> Path:
        return self._work

    @property
    def curve(self) -> Path:
        """On this node; ``start_curve`` and ``fetch_curve`` have it be what all see."""
        return self._work / _CURVE

    @property
    def attempt(self) -> str:
        return self._attempt

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def latest(self) -> State | None:
        """The newest whole checkpoint; one cut short is passed over."""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for item in self._all.walk(self._folder.name):
            _, step, *name = item.name.split("/", 2)
            found[step]["".join(name)] = item.size
        newest_first = sorted((s for s in found if s.startswith("step-")), reverse=True)
        return next(filter(None, (self._state(step, found[step]) for step in newest_first)), None)

    def model(self, step: int) -> Path:
        """As ``fetch``, the Hugging Face folder in it."""
        return self.fetch(step) / "model"

    def fetch(self, step: int) -> Path:
        """A checkpoint's folder on this node; raises DataError if the checkpoint is not whole."""
        folder = self.path(step)
        if self._store and not self._is_here(folder):
            self._copy_here(folder)
        if _state(folder) is None:
            raise DataError(
                f"{self._all.path(f'{self._folder.name}/{folder.name}')}: the checkpoint is cut "
                f"short or gone; remove {self._all.where} and train again."
            )
        return folder

    def _state(self, step: str, sizes: dict[str, int]) -> State | None:
        """sizes: bytes of the files of a checkpoint, by name."""
        try:
            values = json.loads(self._all.get(f"{self._folder.name}/{step}/{_STATE}"))
        except (FileNotFoundError, ValueError):
            return None
        return _whole(values, sizes)

    def _is_here(self, folder: Path) -> bool:
        """Whole, and the one in the store: a training of the same inputs that was begun anew makes
        others of the same steps."""
        try:
            there = self._all.get(f"{self._folder.name}/{folder.name}/{_STATE}")
            return _state(folder) is not None and (folder / _STATE).read_bytes() == there
        except FileNotFoundError:
            return False

    def _copy_here(self, folder: Path) -> None:
        """One rank of a node for all of them. Of a checkpoint that is dropped meanwhile, none."""
        prefix = f"{self._folder.name}/{folder.name}/"
        with alone(folder):
            if self._is_here(folder):
                return
            with files.scratch_folder(folder) as fresh, contextlib.suppress(FileNotFoundError):
                for item in list(self._all.walk(prefix.rstrip("/"))):
                    self._all.get_file(item.name, fresh / item.name.removeprefix(prefix), item.size)
                shutil.rmtree(folder, ignore_errors=True)  # cut short
                fresh.rename(folder)

    def save(self, state: State, write: Callable[[Path], None], n_bytes: int) -> None:
        """Write a checkpoint whole or not at all; then drop all but it and the best one.

        write: puts model/ and optimizer.pt into the folder it is given; n_bytes: about what they
        take. Raises ClusterError.
        """
        self._must_own()
        final = self.path(state.step)
        fresh = self._folder / f".{final.name}.{self._attempt}.tmp"
        with files.disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                fresh.mkdir()
                _write(fresh, write, n_bytes)
                sizes = _sizes(fresh)
                files.write_json(fresh / _STATE, dataclasses.asdict(state) | {"files": sizes})
                files.flush(fresh)
                self._must_own()
                # The step that a run resumed from may be met again, with equal content.
                if _state(final) is None:
                    shutil.rmtree(final, ignore_errors=True)
                    fresh.rename(final)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        kept = {state.step} | ({state.best.step} if state.best else set())
        if self._store:
            self._copy_there(final)
            self._keep_there({self.path(step).name for step in kept})
        self._keep(kept)

    def _copy_there(self, folder: Path) -> None:
        """The curve goes first: it is cut back to a checkpoint's step."""
        if self.curve.exists():
            self._all.put_file(_CURVE, self.curve)
        for name in sorted(_sizes(folder), key=lambda name: name == _STATE):
            if name == _STATE:  # the others may have taken minutes
                self._must_own()
            self._all.put_file(f"{self._folder.name}/{folder.name}/{name}", folder / name)

    def _keep_there(self, steps: set[str]) -> None:
        """Later steps are none of ours: whoever has taken over has made them."""
        self._must_own()
        for item in list(self._all.walk(self._folder.name)):
            step = item.name.split("/")[1]
            if step not in steps and step <= max(steps):
                self._all.delete(item.name)

    def fetch_curve(self) -> None:
        """Have the curve on this node."""
        if self._store:
            with contextlib.suppress(FileNotFoundError):
                files.write_bytes(self.curve, self._all.get(_CURVE))

    def told(self) -> Told | None:
        """What keeps in the store what trackers are told; None where a disk does."""
        return Told(self._work, self._store) if self._store else None

    def leave(self, finished: bool) -> None:
        """Rank 0 writes no more on this node."""
        if self._store and finished:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start_curve(self, step: int) -> None:
        """Begin the curve, or cut it back to ``step``: later records are made again. Have what
        trackers were told on this node, too."""
        if self._store:
            self._forget_later(step)
            told.fetch(self._work, self._store)
        self.fetch_curve()
        self._all.delete(_LIVE)
        kept = [json.dumps(r) + "\n" for r in read_curve(self.curve) if r["step"] <= step]
        files.write_bytes(self.curve, "".join(kept).encode())

    def _forget_later(self, step: int) -> None:
        """What a training of the same inputs left on this node that is over, or was lost."""
        for folder in self._folder.glob("step-*"):
            if folder > self.path(step):
                shutil.rmtree(folder, ignore_errors=True)

    def record(self, **values: Any) -> None:
        """Append one record to the curve."""
        self._must_own(lately=True)
        with files.disk_errors(self._work), self.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def show(self, values: dict[str, Any]) -> None:
        """Say where the run stands; to a store every few seconds."""
        if self._store and time.monotonic() - self._said_at < _STORE_EVERY_S:
            return
        self._must_own(lately=True)
        self._all.put(_LIVE, json.dumps(values).encode())
        self._said_at = time.monotonic()

    def shown(self) -> dict[str, Any] | None:
        """What was said last; asked of a store every few seconds, and None in between."""
        if self._store and time.monotonic() - self._asked_at < _STORE_EVERY_S:
            return None
        self._asked_at = time.monotonic()
        try:
            values: dict[str, Any] = json.loads(self._all.get(_LIVE))
        except FileNotFoundError:
            return None
        return values

    def _keep(self, steps: set[int]) -> None:
        kept = {self.path(step) for step in steps}
        for folder in self._folder.iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _must_own(self, *, lately: bool = False) -> None:
        """lately: that it was so a few seconds ago will do, where a store has to be asked."""
        if lately and self._store and time.monotonic() - self._owned_at < _STORE_EVERY_S:
            return
        self._owned_at = time.monotonic()
        if self._owner() != self._attempt:
            raise self._taken_over()

    def _owner(self) -> str:
        try:
            return self._all.get(_OWNER).decode()
        except FileNotFoundError as error:
            raise ClusterError(
                f"{self._work}: not on this node; the recipe's output must be a folder on a disk "
                "that all nodes share, or an object store's URL."
            ) from error

    def _taken_over(self) -> ClusterError:
        return ClusterError(
            f"{self._all.where}: another run of the same training has taken over; this one stops."
        )


def _state(folder: Path) -> State | None:
    """What a checkpoint remembers; None if it is not whole, or not there."""
    try:
        values = files.read_json(folder / _STATE)
    except DataError:
        return None
    return _whole(values, _sizes(folder))


def _whole(values: dict[str, Any], sizes: dict[str, int]) -> State | None:
    """values: of a state file; sizes: bytes of the files beside it, by name."""
    there = {name: n for name, n in sizes.items() if name != _STATE}
    if there != values.pop("files", None):
        return None
    evaluations = tuple(Evaluation(**e) for e in values.pop("evaluations"))
    return State(**values, evaluations=evaluations)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by its path there."""
    there = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in there}


def _write(folder: Path, write: Callable[[Path], None], n_bytes: int) -> None:
    """Write a checkpoint's tensors; raises OSError where they do not fit on the disk.

    safetensors 0.8 and torch 2.13 raise errors of their own then, which do not say what was wrong
    but in words: so ask the disk for as many bytes.
    """
    try:
        write(folder)
    except OSError:
        raise
    except Exception:
        shutil.rmtree(folder)
        folder.mkdir()
        with (folder / "room").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        raise


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The whole records of a curve that may be under writing; none where there is no file.

    Half a line is none: of a writer that was killed, or that one more was still writing behind.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            records += [json.loads(line)] if line.endswith("\n") else []
    return records
