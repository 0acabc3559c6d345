"""A run's folder: where each step's own lies, which models it is about, and who works in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from journeyman import files, models
from journeyman.errors import ClusterError, DataError
from journeyman.folder import Folder
from journeyman.mirror import Mirror, reading_copy_of
from journeyman.models import Model
from journeyman.recipe import Classes, Recipe, digest

_FOLDERS = {
    "prepare": "corpus",
    "label": "labels",
    "train": "student",
    "certify": "bundle",
    "measure": "serving",
    "report": "report",
    "curve": "curve",
    "export": "exports",
}
_LEDGER = ".ledger"  # the dot: `runs/*` are runs


def here(where: str) -> Path:
    """A run's folder; of a URL this machine's copy, of what steps made of the labels.

    Raises DataError where there is no run, ClusterError.
    """
    if directory := Folder(where).directory:
        return directory
    run = Mirror(local=reading_copy_of(where), url=where.rstrip("/"))
    there = [run.below(_FOLDERS[step]).pull() for step in ("train", "certify", "measure")]
    if not any(there):
        raise DataError(f"{where}: there is no run with a student; run journeyman run first.")
    return run.local


def folder_of(run_dir: Path, step: str) -> Path:
    """The folder that a step of the run in this one writes."""
    return run_dir / _FOLDERS[step]


class RunFolder:
    """The folder of one recipe's run."""

    def __init__(self, recipe: Recipe, directory: Path | None = None) -> None:
        """directory: where it is read on this machine, if not where the recipe writes it."""
        self.recipe = recipe
        self.directory = directory or recipe.run_dir

    @property
    def where(self) -> str:
        """As people name it."""
        return self.recipe.run_url or str(self.directory)

    def path(self, step: str) -> Path:
        """The folder that a step writes; the copy on this machine where the run is in a store."""
        return folder_of(self.directory, step)

    def mirror(self, step: str) -> Mirror:
        """The same, and where it lies."""
        return self._whole.below(_FOLDERS[step])

    @property
    def _whole(self) -> Mirror:
        return Mirror(local=self.directory, url=self.recipe.run_url)

    def fetch(self, *steps: str) -> None:
        """Have what these steps wrote on this machine, where the run is in a store."""
        if self.recipe.run_url:
            for step in steps:
                self.mirror(step).pull()

    @property
    def corpus(self) -> str | Path:
        """Where the corpus is, for every node."""
        return self.mirror("prepare").url or self.path("prepare")

    @property
    def labels(self) -> str | Path:
        """Where the label dataset is."""
        return self.recipe.labels.destination or self.mirror("label").url or self.path("label")

    @property
    def ledger(self) -> Folder:
        """Where the runs beside one another say what their certify rows were used for: those of the
        same classes, or all whose students write. Nobody chooses between students of two jobs, so
        that what one spends of a text is nothing to the other."""
        labels = self.recipe.labels
        job = digest(sorted(labels.classes) if isinstance(labels, Classes) else "text")
        if self.recipe.run_url:
            return Folder(f"{self.recipe.run_url.rpartition('/')[0]}/{_LEDGER}/{job}")
        return Folder(self.directory.parent / _LEDGER / job)

    @cached_property
    def teacher(self) -> Model:
        return models.teacher(self.recipe.teacher)

    @cached_property
    def base_student(self) -> Model:
        return models.resolve(self.recipe.learner().model, self.recipe.learner().revision)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder; raises ClusterError if another process does."""
        path = self.directory / ".lock"
        with files.disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ClusterError(
                    f"{self.directory}: another journeyman (process {file.read().strip()}) is "
                    "working there; wait for it, or give this run another name."
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
