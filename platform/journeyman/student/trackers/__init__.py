"""Where a run's curve goes besides its own file: TensorBoard, MLflow, Weights & Biases.

Rank 0 tells them. A run that goes on after a kill goes on in the same place, and what was told
before is not told again: beside the checkpoints there is a list of it for each tracker.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from journeyman import files
from journeyman.errors import RecipeError

# Name in a recipe to the package that it needs.
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_GROUPS = {"steps": "train", "evaluation": "evaluation"}
_NOT_METRICS = ("kind", "step", "total_steps", "against")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The run that is tracked.

    id: the same from its first start to its end, and of no other run.
    """

    name: str
    id: str
    folder: Path  # the run's, for what is kept in files
    settings: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.name}-{self.id[:8]}"


class Tracker(Protocol):
    """One module each, with ``start(tracked)``: a new run, or the one with this id again."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Have these on disk, or on their way, before it returns."""

    def close(self, finished: bool) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raises RecipeError where the package of one is not installed."""
    for name in names:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"training.trackers: {name} needs the package {package}; pip install {package}, "
                f"or leave {name} out."
            )


def check_server() -> None:
    """Raises RecipeError where MLflow would keep its own files, and no disk is there for all."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise RecipeError(
            "training.trackers: mlflow keeps its files in the run's folder, which is no folder "
            "here but a URL; name a server in MLFLOW_TRACKING_URI, or leave mlflow out."
        )


class Trackers:
    """All trackers of a run. One that fails is left out from then on: training goes on."""

    def __init__(
        self,
        names: Sequence[str],
        name: str,
        folder: Path,
        settings: Mapping[str, Any],
        memory: Path,
        records: Sequence[Mapping[str, Any]],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """memory: a folder that lives as long as the run is unfinished; records: the curve so far,
        of which each tracker is told what it does not know; changed: called behind each change of
        memory."""
        self._memory, self._changed = memory, changed
        self._open: dict[str, Tracker] = {}
        self._told: dict[str, set[str]] = {}
        if not names:
            return
        tracked = Tracked(name=name, id=self._id(), folder=folder, settings=settings)
        for name in names:
            told = memory / f"told-{name}"
            self._told[name] = set(told.read_text().splitlines()) if told.exists() else set()
            self._try(name, partial(self._start, name, tracked))
        for record in records:
            self.record(record)

    def _id(self) -> str:
        path = self._memory / "id"
        if not path.exists():
            files.write_bytes(path, uuid.uuid4().hex.encode())
            self._changed()
        return path.read_text()

    def _start(self, name: str, tracked: Tracked) -> None:
        module = importlib.import_module(f"journeyman.student.trackers.{name}")
        self._open[name] = module.start(tracked)

    def record(self, record: Mapping[str, Any]) -> None:
        """One record of the curve."""
        group = _GROUPS.get(record["kind"])
        if group is None:
            return
        key = f"{record['kind']} {record['step']}"
        values = {
            f"{group}/{name}": float(value)
            for name, value in record.items()
            if name not in _NOT_METRICS and value is not None
        }
        for name in list(self._open):
            if key not in self._told[name]:
                self._try(name, partial(self._tell, name, key, record["step"], values))

    def _tell(self, name: str, key: str, step: int, values: Mapping[str, float]) -> None:
        self._open[name].log(step, values)
        self._told[name].add(key)
        with (self._memory / f"told-{name}").open("a") as file:
            file.write(f"{key}\n")
        self._changed()

    def close(self, finished: bool) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.close, finished))
        self._open.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """Trackers talk to servers, and raise whatever their clients do."""
        try:
            action()
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            print(
                f"training.trackers: {name} failed ({type(error).__name__}: {first}) and is left "
                "out from here on; training goes on.",
                file=sys.stderr,
                flush=True,
            )
            self._open.pop(name, None)
