"""Checkpoints are written while training goes on: in a thread, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from pathlib import Path

from journeyman.student.checkpoints import Checkpoints, State


class CheckpointWriter:
    """What goes wrong in the thread is raised by the next ``busy``, ``wait`` or ``begin``."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._under_way: futures.Future[None] | None = None

    def busy(self) -> bool:
        """Whether a checkpoint is under way."""
        if self._under_way and not self._under_way.done():
            return True
        self.wait()
        return False

    def wait(self) -> None:
        """Until the checkpoint under way is whole."""
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()

    def begin(
        self, state: State, snapshot: Callable[[], Callable[[Path], None]], n_bytes: int
    ) -> None:
        """Take a snapshot and write it, both once the checkpoint under way is whole: there is never
        more than one copy of the tensors.

        snapshot: gives ``Checkpoints.save`` its ``write``; n_bytes: as there.
        """
        self.wait()
        write = snapshot()
        self._under_way = self._thread.submit(self._checkpoints.save, state, write, n_bytes)

    def settle(self) -> None:
        """As ``wait``, and silent: for a training that has ended with an error already."""
        if self._under_way:
            futures.wait([self._under_way])
