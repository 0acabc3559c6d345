"""vLLM's processes on a CPU sleep while they wait for one another.

By itself an engine core of vLLM 0.29 asks again and again (``sched_yield``) whether its worker is
done, on a core that the worker's threads compute on: 4% of labeling's speed on two cores. vLLM
loads this as a plugin (see ``plugins``) in each of its processes.
"""

from __future__ import annotations

import os
import time
from typing import Any

from journeyman.teacher.lifeline import PARENT
from journeyman.teacher.worker import WRITTEN_FOR

_BUSY_S = 1.0
_NAP_MS = 2  # at most: the notice that ends a nap can get lost in vLLM's socket


def sleep_while_waiting() -> None:
    """Let an engine of ours wait for notices between its processes, where it would poll."""
    if PARENT not in os.environ:
        return
    import vllm
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(WRITTEN_FOR) or not current_platform.is_cpu():
        return
    stock = SpinCondition.wait

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        busy = time.monotonic() <= self.last_read + _BUSY_S
        self.busy_loop_s = 0.0
        stock(self, _NAP_MS if busy else timeout_ms)

    SpinCondition.wait = wait
