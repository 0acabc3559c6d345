"""An engine with rows that kill: it, or the process that it is in."""

import asyncio
import contextlib
import os
import signal

import psutil


def engine(base):
    """A subclass of an engine's class; the class itself where no text is deadly."""
    deadly = os.environ.get("JOURNEYMAN_TEST_DEADLY")
    fatal = os.environ.get("JOURNEYMAN_TEST_FATAL")
    if not deadly and not fatal:
        return base

    class Deadly(base):
        async def record_target(self, token_ids, start, k, seed=0):
            text = self.tokenizer.decode(token_ids)
            if fatal and fatal in text:
                os.kill(os.getpid(), signal.SIGKILL)
            if deadly and deadly in text:
                kill_cores()
                await asyncio.sleep(0)  # the request is under way when the death is noticed
            return await super().record_target(token_ids, start, k, seed)

    return Deadly


def kill_cores():
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "EngineCore" in " ".join(process.cmdline()):
                process.kill()
