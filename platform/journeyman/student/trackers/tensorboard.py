"""TensorBoard's event files, in RUN/tensorboard/."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from journeyman.student.trackers import Tracked


def start(tracked: Tracked) -> _EventFiles:
    """A new event file in the run's own folder, which may hold those of earlier starts."""
    return _EventFiles(tracked)


class _EventFiles:
    def __init__(self, tracked: Tracked) -> None:
        folder = tracked.folder / "tensorboard" / tracked.title
        known = folder.exists()
        # torch's own over the package tensorboard: flush() of tensorboardX 2.6 does not wait for
        # its queue, and what a killed run had told would be lost.
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self._writer: Any = tensorboard.SummaryWriter(str(folder))
        if not known:
            lines = "\n".join(f"    {key}: {value}" for key, value in tracked.settings.items())
            self._writer.add_text("training", lines)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()
