"""Where a training run stands on disk: whole checkpoints, one writer, the loss curve.

Written by rank 0, read by all. Knows files and names, nothing of what a model is.

    WORK/attempt                 who may write: the newest start of this run, and of its workers
    WORK/training.jsonl          the curve, one record a line
    WORK/live.json               where the run stands, for the driver
    WORK/trackers/               what trackers have been told
    WORK/checkpoints/step-N/     state.json, model/ (a Hugging Face folder), optimizer.pt
                                 state.json names each file and its bytes
    ../step-N/model/lora.pt      low-rank matrices, where they are what is trained
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman.errors import ClusterError, DataError
from journeyman.files import disk_errors, read_json, write_bytes, write_json

LORA = "lora.pt"  # beside the weights that it is merged into: what training goes on with
_STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the student is worth on the calibrate rows, after so many steps."""

    epoch: int  # that the last step belongs to, from 1
    step: int  # optimizer steps done
    # As in ``learner.Measured``.
    agreement: float
    kl: float
    n_rows: int
    gold_accuracy: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    calibration_error: float | None = None
    gold_calibration_error: float | None = None

    def rank(self) -> tuple[float, float]:
        """Higher is better."""
        if self.perplexity is None:
            return self.agreement, -self.kl
        return -self.kl, self.agreement


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
        agreement on its first choice says little of what it writes, the lowest KL."""
        return max(self.evaluations, key=Evaluation.rank, default=None)


class Checkpoints:
    """The work folder of one run, held by one attempt at it."""

    def __init__(self, work: Path, attempt: str) -> None:
        self._work = work
        self._attempt = attempt
        self._folder = work / "checkpoints"

    @classmethod
    def claim(cls, work: Path) -> Checkpoints:
        """Become the work folder's one writer.

        Workers of a killed driver may live on for seconds; what they write from now on is void.
        """
        attempt = uuid.uuid4().hex
        write_bytes(work / "attempt", attempt.encode())
        return cls(work, attempt)

    def restarted(self) -> Checkpoints:
        """Become the one writer in place of earlier workers of the same driver.

        A worker of a lost node may live on, too. Raises ClusterError if another driver has claimed
        the folder since.
        """
        driver = self._attempt.partition(".")[0]
        if self._owner().partition(".")[0] != driver:
            raise self._taken_over()
        mine = f"{driver}.{uuid.uuid4().hex}"
        write_bytes(self._work / "attempt", mine.encode())
        return Checkpoints(self._work, mine)

    @property
    def work(self) -> Path:
        return self._work

    @property
    def live(self) -> Path:
        return self._work / "live.json"

    @property
    def curve(self) -> Path:
        return self._work / "training.jsonl"

    @property
    def attempt(self) -> str:
        return self._attempt

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def latest(self) -> State | None:
        """The newest whole checkpoint; one cut short is passed over."""
        newest_first = sorted(self._folder.glob("step-*"), reverse=True)
        return next(filter(None, map(_state, newest_first)), None)

    def model(self, step: int) -> Path:
        """A checkpoint's Hugging Face folder; raises DataError if the checkpoint is not whole."""
        folder = self.path(step)
        if _state(folder) is None:
            raise DataError(
                f"{folder}: the checkpoint is cut short or gone; remove {self._work} and train "
                "again."
            )
        return folder / "model"

    def save(self, state: State, write: Callable[[Path], None], n_bytes: int) -> None:
        """Write a checkpoint whole or not at all; then drop all but it and the best one.

        write: puts model/ and optimizer.pt into the folder it is given; n_bytes: about what they
        take. Raises ClusterError.
        """
        self._must_own()
        final = self.path(state.step)
        fresh = self._folder / f".{final.name}.{self._attempt}.tmp"
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                fresh.mkdir()
                _write(fresh, write, n_bytes)
                sizes = _sizes(fresh)
                write_json(fresh / _STATE, dataclasses.asdict(state) | {"files": sizes})
                _flush(fresh)
                self._must_own()
                # The step that a run resumed from may be met again, with equal content.
                if _state(final) is None:
                    shutil.rmtree(final, ignore_errors=True)
                    fresh.rename(final)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        self._keep({state.step} | ({state.best.step} if state.best else set()))

    def start_curve(self, step: int) -> None:
        """Begin the curve, or cut it back to ``step``: later records are made again."""
        self.live.unlink(missing_ok=True)
        kept = [json.dumps(r) + "\n" for r in read_curve(self.curve) if r["step"] <= step]
        write_bytes(self.curve, "".join(kept).encode())

    def record(self, **values: Any) -> None:
        """Append one record to the curve."""
        self._must_own()
        with disk_errors(self._work), self.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def show(self, values: dict[str, Any]) -> None:
        """Say where the run stands."""
        self._must_own()
        write_json(self.live, values)

    def _keep(self, steps: set[int]) -> None:
        kept = {self.path(step) for step in steps}
        for folder in self._folder.iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _must_own(self) -> None:
        if self._owner() != self._attempt:
            raise self._taken_over()

    def _owner(self) -> str:
        try:
            return (self._work / "attempt").read_text()
        except FileNotFoundError as error:
            raise ClusterError(
                f"{self._work}: not on this node; the recipe's output must be a folder on a disk "
                "that all nodes share."
            ) from error

    def _taken_over(self) -> ClusterError:
        return ClusterError(
            f"{self._work}: another run of the same training has taken over; this one stops."
        )


def _state(folder: Path) -> State | None:
    """What a checkpoint remembers; None if it is not whole, or not there."""
    try:
        values = read_json(folder / _STATE)
    except DataError:
        return None
    sizes = {name: n for name, n in _sizes(folder).items() if name != _STATE}
    if sizes != values.pop("files", None):
        return None
    evaluations = tuple(Evaluation(**e) for e in values.pop("evaluations"))
    return State(**values, evaluations=evaluations)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


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


def _flush(folder: Path) -> None:
    """Have the files on the disk before the name says that they are whole."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The whole records of a curve that may be under writing; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
