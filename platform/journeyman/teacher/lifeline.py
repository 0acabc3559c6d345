"""An engine's process ends with the process that started it, and with its workers elsewhere.

vLLM 0.29's engine core lives on when its parent is killed, holding gigabytes and every core; and
for five minutes when a worker on another node has died, as it waits for that one's answer. vLLM
loads this as a plugin (see ``plugins``) in each of its processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

PARENT = "JOURNEYMAN_ENGINE_PARENT"  # process id of the one that starts engines
SPREAD = "JOURNEYMAN_ENGINE_SPREAD"  # set where its workers are Ray's
_PR_SET_PDEATHSIG = 1
_TO_SAY_SO_S = 5.0  # for a core whose worker has died to tell of it in its own way


def follow() -> None:
    """What vLLM calls in each of its processes."""
    _follow_parent()
    if os.environ.get(SPREAD):
        _follow_workers()


def _follow_parent() -> None:
    """Ask Linux to kill this process when its parent dies, if this is an engine of ours."""
    parent = os.environ.get(PARENT)
    if sys.platform != "linux" or parent != str(os.getppid()):
        return  # the parent itself, or a worker, which vLLM ends with its engine core
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != parent:  # it died just before
        os.kill(os.getpid(), signal.SIGKILL)


def _follow_workers() -> None:
    """Where vLLM calls back for a dead worker, end this process, the engine's core."""
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

    register = getattr(RayExecutorV2, "register_failure_callback", None)
    if register is None:  # of another version: five minutes are waited
        return

    def register_and_end(executor: Any, callback: Callable[[], None]) -> None:
        def failed() -> None:
            end = threading.Timer(_TO_SAY_SO_S, os._exit, (1,))
            end.daemon = True
            end.start()
            callback()

        register(executor, failed)

    RayExecutorV2.register_failure_callback = register_and_end
