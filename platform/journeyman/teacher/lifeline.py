"""An engine's process ends with the process that started it, however that one ends.

vLLM 0.29's engine core lives on when its parent is killed, holding gigabytes and every core. vLLM
loads this as a plugin (``vllm.general_plugins`` in pyproject.toml) in each of its processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "JOURNEYMAN_ENGINE_PARENT"  # process id of the one that starts engines
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Ask Linux to kill this process when its parent dies, if this is an engine of ours."""
    parent = os.environ.get(PARENT)
    if sys.platform != "linux" or parent != str(os.getppid()):
        return  # the parent itself, or a worker, which vLLM ends with its engine core
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != parent:  # it died just before
        os.kill(os.getpid(), signal.SIGKILL)
