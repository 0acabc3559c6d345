"""Batches that grow with the load: one worker takes all that waits, whenever it is free.

Plain asyncio and one thread; knows nothing of models. ``serve.batch`` fixes a batch before it
waits for the running one, so that under load batches stop growing and the queue explodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

_NEW = 0.3  # what the last batch weighs in the pace

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    size: int
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Calls ``work`` in a thread of its own, one batch at a time.

    work: one result for each item, in order. If it raises, each item of the batch is tried alone,
    so that an error reaches only the callers whose items it is about.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        max_size: int,
        worked: Callable[[float], None] = lambda _: None,
        size_of: Callable[[Item], int] = lambda _: 1,
        max_total: float = math.inf,
    ) -> None:
        """max_size: items of a batch; worked: told after each batch how many seconds it took;
        size_of: an item, in whatever its work grows with, tokens say; max_total: of a batch, but
        for an item that alone is larger."""
        self._work = work
        self._worked = worked
        self._max_size = max_size
        self._size_of, self._max_total = size_of, max_total
        self._pace_s: float | None = None  # for one in size, where batches are full
        self._size_waiting = 0
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batcher")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the worker. Not from within a request: Serve ends a request's tasks with it."""
        self._worker = asyncio.get_running_loop().create_task(self._run(), name="batcher")

    async def close(self) -> None:
        """Stop. Who still waits is cancelled; the batch in the thread is worked to its end."""
        if self._worker:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        _cancel(self._waiting)
        self._waiting.clear()
        self._size_waiting = 0
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def wait_s(self) -> float:
        """Seconds until all that waits is worked on, at the pace of the last full batches; 0 where
        there was none yet."""
        return self._size_waiting * (self._pace_s or 0.0)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results of some items, in order; they may share batches with other callers' items.

        A caller that is cancelled takes its waiting items along.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        came = [
            _Waiting(item=item, size=self._size_of(item), future=future)
            for item, future in zip(items, futures, strict=True)
        ]
        self._waiting.extend(came)
        self._size_waiting += sum(waiting.size for waiting in came)
        self._arrived.set()
        return await asyncio.gather(*futures)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch, is_full = self._take()
            try:
                await self._answer(batch, is_full)
            except asyncio.CancelledError:
                _cancel(batch)
                raise

    def _take(self) -> tuple[list[_Waiting[Item, Result]], bool]:
        """All that waits, oldest first, up to the largest batch; and whether it is that."""
        batch: list[_Waiting[Item, Result]] = []
        total, is_full = 0, False
        while self._waiting and not is_full:
            waiting = self._waiting[0]
            if not waiting.future.done():
                if batch and total + waiting.size > self._max_total:
                    is_full = True
                    break
                batch.append(waiting)
                total += waiting.size
                is_full = len(batch) == self._max_size
            self._waiting.popleft()
            self._size_waiting -= waiting.size
        if not self._waiting:
            self._arrived.clear()
        return batch, is_full

    async def _answer(self, batch: list[_Waiting[Item, Result]], is_full: bool = False) -> None:
        if not batch:  # all of them gave up
            return
        try:
            results = await self._work_on(batch, is_full)
        except Exception as error:  # it belongs to the callers, whatever it is
            if len(batch) > 1:
                for waiting in batch:
                    await self._answer([waiting])
            elif not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(result)

    async def _work_on(
        self, batch: list[_Waiting[Item, Result]], is_full: bool
    ) -> Sequence[Result]:
        items = [waiting.item for waiting in batch]
        began = time.monotonic()
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._work, items
            )
        finally:
            seconds = time.monotonic() - began
            self._worked(seconds)
        if len(results) != len(items):
            raise RuntimeError(f"{len(items)} items went in and {len(results)} results came out")
        self._keep_pace(seconds / max(1, sum(waiting.size for waiting in batch)), is_full)
        return results

    def _keep_pace(self, seconds: float, is_full: bool) -> None:
        """seconds: for one in size. A batch that is not full takes longer for each, so it says
        something only where it was quicker than the full ones."""
        if self._pace_s is None:
            self._pace_s = seconds if is_full else None
        elif is_full or seconds < self._pace_s:
            self._pace_s += _NEW * (seconds - self._pace_s)


def _cancel(waiting: Iterable[_Waiting[Item, Result]]) -> None:
    for one in waiting:
        one.future.cancel()
