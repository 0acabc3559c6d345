"""A run's folder: where each step's own lies, which models it is about, and who works in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from journeyman import files, models
from journeyman.errors import ClusterError
from journeyman.models import Model
from journeyman.recipe import Recipe

_FOLDERS = {
    "prepare": "corpus",
    "label": "labels",
    "train": "student",
    "certify": "bundle",
    "measure": "serving",
    "report": "report",
}


class RunFolder:
    """The folder of one recipe's run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.directory = recipe.run_dir

    def path(self, step: str) -> Path:
        """The folder that a step writes."""
        return self.directory / _FOLDERS[step]

    @property
    def labels(self) -> str | Path:
        """Where the label dataset is."""
        return self.recipe.labels.destination or self.path("label")

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
