"""Students that classify in a deployment of their own, on a GPU say: what scores there, and how the
ingress asks it. The rule by which their answers are accepted stays with the ingress."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from journeyman.cascade.batcher import Batcher
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.refusals import keeps_up, student_behind
from journeyman.certify.bundle import PolicyBundle
from journeyman.errors import ModelError
from journeyman.recipe import Cascade
from serve.apart import Apart
from serve.failures import without_words
from serve.loading import Loaded
from serve.students import Behind, Reader, batcher_of, in_turn, readers
from serve.teacher import Unavailable, this_replica

_ROWS_A_PASS, _TOKENS_A_PASS = 256, 16_384  # on a GPU, which short passes leave idle


class Scorer:
    """The students of one bundle in a replica: batches grow with the load of all ingresses."""

    def __init__(self, loaded: Loaded, place: Cascade, worked: Callable[[float], None]) -> None:
        """Loads them; raises ModelError, BundleMismatch. place: the application's settings, of
        which it has its CPUs, its GPUs and the size of its batches; worked: told after each batch
        how many seconds it took."""
        if place.student_gpus:
            _check_gpu()
        threads = max(1, math.ceil(place.student_cpus))
        self._failure: str | None = None
        on_gpu = bool(place.student_gpus)
        self._readers = readers(loaded, threads, on_gpu=on_gpu)
        self._passes = (_ROWS_A_PASS, _TOKENS_A_PASS) if on_gpu else ()
        self._timeout_s = place.request_timeout_s
        self._batchers: list[Batcher[str, np.ndarray]] = [
            batcher_of(partial(self._logits, reader), place, loaded, worked)
            for reader in self._readers
        ]
        self._begun = False

    async def score(self, texts: Sequence[str], stage: int) -> np.ndarray | Behind | Unavailable:
        """float32[n, c], logits; raises Failed."""
        if self._failure is not None:
            return self._broken(self._failure)
        wait_s = sum(batcher.wait_s for batcher in self._batchers)  # which share the device
        if not keeps_up(wait_s, self._timeout_s):
            return Behind(wait_s=wait_s)
        self._begin()
        return np.stack(await without_words(self._batchers[stage].submit(texts)))

    async def unready(self) -> Unavailable | None:
        return self._broken(self._failure) if self._failure is not None else None

    async def check_health(self) -> None:
        """Raises RuntimeError once its device answers nothing more."""
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def stop(self) -> None:
        """There is nothing that outlives its process."""

    async def close(self) -> None:
        for batcher in self._batchers:
            await batcher.close()
        for reader in self._readers:
            reader.close()

    def _begin(self) -> None:
        """With the first request, as it is made in a thread without a loop; in a context of its
        own, since Serve ends the tasks of a request with it."""
        if not self._begun:
            self._begun = True
            for batcher in self._batchers:
                contextvars.Context().run(batcher.start)

    def _logits(self, reader: Reader, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """In the batcher's thread."""
        import torch

        try:
            return list(reader.logits(texts, *self._passes))
        except torch.AcceleratorError as error:  # a device that fails once fails for good
            self._failure = f"the student's device failed: {type(error).__name__}"
            raise

    def _broken(self, failure: str) -> Unavailable:
        return Unavailable(reason=failure, replica=this_replica())


class Scored(Apart):
    """One student or several that are asked in turn, each call for one of them."""

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        """Raises StudentUnavailable."""
        bundle = self._loaded.bundle
        assert isinstance(bundle, PolicyBundle)
        stages = [partial(self._decided, stage) for stage in range(len(bundle.before) + 1)]
        return await in_turn(stages, items, self._rule)

    async def _decided(self, stage: int, texts: Sequence[str]) -> list[Decision | Escalation]:
        scored = await self._there(self._engine.scores(texts, stage))
        if isinstance(scored, Behind):
            raise student_behind(scored.wait_s)
        return self._rule.decided(texts, scored, stage)


def _check_gpu() -> None:
    """Raises ModelError."""
    import torch

    if not torch.cuda.is_available():
        raise ModelError(
            f"cascade.student_gpus: torch {torch.__version__} sees no GPU here; install its CUDA "
            "build and look at the driver, or have the student on CPUs, by cascade.student_apart."
        )
