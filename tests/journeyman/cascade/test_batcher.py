"""The batcher takes all that waits whenever it is free, and keeps callers apart."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from journeyman.cascade.batcher import Batcher


class Work:
    """Squares numbers; notes its batches, waits where it is told to, and chokes on negatives."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        assert self.go_on.wait(10)
        if any(item < 0 for item in items):
            raise ValueError(f"{min(items)} is negative")
        return [item**2 for item in items]


def run(max_size: int, test: Callable[[Batcher, Work], Awaitable[None]]) -> Work:
    work = Work()

    async def with_batcher() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_size)
        batcher.start()
        try:
            async with asyncio.timeout(20):
                await test(batcher, work)
        finally:
            work.go_on.set()
            await batcher.close()

    asyncio.run(with_batcher())
    return work


async def while_one_is_running(batcher: Batcher, work: Work) -> asyncio.Task:
    """A first item's task, after its batch of one has begun; ends once work.go_on is set."""
    work.go_on.clear()
    first = asyncio.create_task(batcher.submit([100]))
    while not work.batches:
        await asyncio.sleep(0.001)
    return first


def test_whatever_came_while_it_was_busy_makes_one_batch():
    async def test(batcher: Batcher, work: Work) -> None:
        first = await while_one_is_running(batcher, work)
        others = [asyncio.create_task(batcher.submit([n])) for n in range(5)]
        await asyncio.sleep(0.01)
        assert batcher.n_waiting == 5
        work.go_on.set()
        assert await first == [10_000]
        assert await asyncio.gather(*others) == [[n**2] for n in range(5)]

    work = run(8, test)
    assert work.batches == [[100], [0, 1, 2, 3, 4]]
    assert len(work.threads) == 1 and threading.get_ident() not in work.threads


def test_nothing_waits_for_company():
    async def test(batcher: Batcher, work: Work) -> None:
        assert await batcher.submit([3]) == [9]

    assert run(8, test).batches == [[3]]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    max_size=st.integers(1, 5),
)
def test_every_caller_gets_its_results_in_order_and_no_batch_is_too_large(sizes, max_size):
    async def test(batcher: Batcher, work: Work) -> None:
        first = await while_one_is_running(batcher, work)
        asked = [list(range(10 * i, 10 * i + size)) for i, size in enumerate(sizes)]
        tasks = [asyncio.create_task(batcher.submit(items)) for items in asked]
        await asyncio.sleep(0)
        work.go_on.set()
        await first
        assert await asyncio.gather(*tasks) == [[n**2 for n in items] for items in asked]

    work = run(max_size, test)
    n_items = sum(sizes)
    assert [len(b) for b in work.batches[1:]] == [
        min(max_size, n_items - start) for start in range(0, n_items, max_size)
    ]


def in_batches(sizes: Sequence[int], max_size: int, max_total: int) -> list[list[int]]:
    """The batches of items of these sizes that all wait together."""
    work = Work()

    async def test() -> None:
        batcher: Batcher[int, int] = Batcher(
            work, max_size, size_of=lambda item: item, max_total=max_total
        )
        batcher.start()
        first = await while_one_is_running(batcher, work)
        waiting = asyncio.create_task(batcher.submit(sizes))
        await asyncio.sleep(0)
        work.go_on.set()
        await first
        assert await waiting == [size**2 for size in sizes]
        await batcher.close()

    asyncio.run(test())
    return work.batches[1:]


def test_a_long_item_is_no_company_for_many_short_ones():
    assert in_batches([6] * 31 + [512], 32, 512) == [[6] * 31, [512]]
    assert in_batches([512] + [6] * 31, 32, 512) == [[512], [6] * 31]
    assert in_batches([600, 1], 32, 512) == [[600], [1]], "one alone may be larger"


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    max_size=st.integers(1, 5),
    max_total=st.integers(1, 20),
)
def test_batches_are_as_large_as_both_limits_let_them_be(sizes, max_size: int, max_total: int):
    batches = in_batches(sizes, max_size, max_total)
    assert [size for batch in batches for size in batch] == sizes
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        assert len(batch) == 1 or (len(batch) <= max_size and sum(batch) <= max_total)
        if after:
            assert len(batch) == max_size or sum(batch) + after[0] > max_total


def test_an_error_reaches_the_caller_whose_item_it_is_about_and_no_other():
    async def test(batcher: Batcher, work: Work) -> None:
        first = await while_one_is_running(batcher, work)
        tasks = [asyncio.create_task(batcher.submit(items)) for items in ([1, 2], [3, -4], [5])]
        await asyncio.sleep(0.01)
        work.go_on.set()
        await first
        good, bad, also_good = await asyncio.gather(*tasks, return_exceptions=True)
        assert (good, also_good) == ([1, 4], [25])
        assert isinstance(bad, ValueError) and str(bad) == "-4 is negative"
        assert await batcher.submit([6]) == [36]

    run(8, test)


def test_callers_that_gave_up_are_not_worked_for_and_stall_nobody():
    async def test(batcher: Batcher, work: Work) -> None:
        first = await while_one_is_running(batcher, work)
        tasks = [asyncio.create_task(batcher.submit([n, n])) for n in range(4)]
        await asyncio.sleep(0.01)
        for task in (first, tasks[0], tasks[2]):  # one in work, two that wait
            task.cancel()
        await asyncio.sleep(0.01)
        work.go_on.set()
        assert await tasks[1] == [1, 1] and await tasks[3] == [9, 9]
        assert first.cancelled() and tasks[0].cancelled() and tasks[2].cancelled()

    assert run(8, test).batches == [[100], [1, 1, 3, 3]]


def test_too_few_results_are_an_error_and_no_mix_up():
    async def test() -> None:
        batcher: Batcher[int, int] = Batcher(lambda items: list(items)[1:], 4)
        batcher.start()
        with pytest.raises(RuntimeError, match="1 items went in and 0 results came out"):
            await batcher.submit([1, 2])
        await batcher.close()

    asyncio.run(test())


def test_closing_cancels_who_still_waits():
    async def test(batcher: Batcher, work: Work) -> None:
        first = await while_one_is_running(batcher, work)
        second = asyncio.create_task(batcher.submit([1]))
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.05, work.go_on.set)
        await batcher.close()
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(o) for o in outcomes] == [asyncio.CancelledError] * 2

    run(1, test)


def test_it_tells_how_long_each_batch_took_a_failing_one_too() -> None:
    took: list[float] = []

    def work(items: Sequence[int]) -> list[int]:
        time.sleep(0.01)
        return [1 // item for item in items]

    async def ask() -> None:
        batcher: Batcher[int, int] = Batcher(work, 4, took.append)
        batcher.start()
        assert await batcher.submit([1]) == [1]
        with pytest.raises(ZeroDivisionError):
            await batcher.submit([0])
        await batcher.close()

    asyncio.run(ask())
    assert len(took) == 2 and min(took) >= 0.01


def test_what_waits_takes_as_long_as_at_the_pace_of_full_batches() -> None:
    """An item by itself takes longer than its share of a full batch."""
    seconds = {1: 0.04, 4: 0.04, 2: 0.002}

    def work(items: Sequence[int]) -> list[int]:
        time.sleep(seconds[len(items)])
        return list(items)

    async def ask() -> None:
        batcher: Batcher[int, int] = Batcher(work, 4)
        batcher.start()
        waiting: list[float] = []

        async def seen(n: int) -> None:
            """What is said while so many wait."""
            task = asyncio.create_task(batcher.submit(range(n)))
            await asyncio.sleep(0)
            waiting.append(batcher.wait_s)
            await task

        for n in (1, 40, 1, 40, 2, 40):
            await seen(n)
        await batcher.close()
        none, _, of_one, full, _, quicker = waiting
        assert none == 0.0 and batcher.wait_s == 0.0
        assert of_one == pytest.approx(full / 40) and 0.4 <= full < 4
        assert quicker < full

    asyncio.run(ask())


def test_long_items_that_wait_take_longer_than_as_many_short_ones() -> None:
    def work(sizes: Sequence[int]) -> list[int]:
        time.sleep(0.001 * sum(sizes))
        return list(sizes)

    async def ask() -> None:
        batcher: Batcher[int, int] = Batcher(work, 4, size_of=lambda item: item, max_total=40)
        batcher.start()
        await batcher.submit([20, 20, 1])  # full by its total, which sets the pace
        waits = []
        for sizes in ([10] * 4, [1] * 4):
            task = asyncio.create_task(batcher.submit(sizes))
            await asyncio.sleep(0)
            waits.append(batcher.wait_s)
            await task
        long, short = waits
        assert long > 3 * short and 0.04 <= long < 0.4
        assert batcher.wait_s == 0.0
        gone = asyncio.create_task(batcher.submit([30]))
        await asyncio.sleep(0)
        gone.cancel()
        assert await batcher.submit([1]) == [1] and batcher.wait_s == 0.0
        await batcher.close()

    asyncio.run(ask())
