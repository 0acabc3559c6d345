"""Prompts that a row asks at once begin in one step of an engine that stood idle.

They reach vLLM's engine core one behind the other, some milliseconds apart, and an idle one begins
with the first alone: the row is answered only after the second step, and the first has read all
weights for one prompt. vLLM loads this as a plugin (see ``plugins``) in each of its processes.
"""

from __future__ import annotations

import os
import queue
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from journeyman.teacher.lifeline import PARENT
from journeyman.teacher.worker import WRITTEN_FOR

SIBLINGS = "journeyman_siblings"  # extra_args: a row's number, and how many prompts it asks at once
_AT_MOST_S = 0.02  # one that was refused never comes


def begin_together() -> None:
    """Let an engine core of ours that wakes wait for the rest of the rows that woke it."""
    if PARENT not in os.environ:
        return
    import vllm
    from vllm.v1.engine.core import EngineCoreProc

    if not vllm.__version__.startswith(WRITTEN_FOR):
        return
    stock = EngineCoreProc._process_input_queue

    def process(self: Any) -> None:
        was_idle = not self.has_work()
        stock(self)
        if was_idle:
            _await_the_rest(self)

    EngineCoreProc._process_input_queue = process


def _await_the_rest(core: Any) -> None:
    until = time.monotonic() + _AT_MOST_S
    while not _are_whole(core.scheduler.requests.values()):
        try:
            message = core.input_queue.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return
        core._handle_client_request(*message)


def _are_whole(requests: Iterable[Any]) -> bool:
    """Whether all rows have all their prompts there."""
    marks = ((one.sampling_params and one.sampling_params.extra_args) or {} for one in requests)
    rows = Counter(tuple(mark[SIBLINGS]) for mark in marks if SIBLINGS in mark)
    return all(came >= of for (_, of), came in rows.items())
