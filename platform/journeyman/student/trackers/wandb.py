"""A Weights & Biases run: where WANDB_MODE and `wandb login` say, files in RUN/wandb/."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from journeyman.student.trackers import Tracked


def start(tracked: Tracked) -> _Run:
    """The project of the recipe's name, and in it a new run or that with the same id."""
    return _Run(tracked)


class _Run:
    def __init__(self, tracked: Tracked) -> None:
        wandb = importlib.import_module("wandb")
        tracked.folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=tracked.name,
            name=tracked.title,
            id=tracked.id,
            resume="allow",
            dir=str(tracked.folder),
            config=dict(tracked.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Evaluations come behind the steps that they follow, so that wandb's own count of steps
        # would refuse some: ours is a metric of its own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
