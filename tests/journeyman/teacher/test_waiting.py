"""Queues between vLLM's processes: their readers sleep, and hear of a message all the same."""

from __future__ import annotations

import threading
import time

import pytest

from journeyman.teacher import lifeline, waiting


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch):
    """vLLM's own queue, written to in this thread and read in another one."""
    from vllm.distributed.device_communicators import shm_broadcast

    stock = shm_broadcast.SpinCondition.wait
    monkeypatch.setattr(shm_broadcast.SpinCondition, "wait", stock)  # and puts it back
    monkeypatch.setenv(lifeline.PARENT, "1")
    waiting.sleep_while_waiting()
    assert shm_broadcast.SpinCondition.wait is not stock
    writer = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1, local_reader_ranks=[0])
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), rank=0)
    readies = [threading.Thread(target=q.wait_until_ready) for q in (writer, reader)]
    for thread in readies:
        thread.start()
    for thread in readies:
        thread.join(10)
    return writer, reader


def test_a_waiting_reader_takes_no_core(queue) -> None:
    writer, reader = queue
    writer.enqueue("first")
    assert reader.dequeue(timeout=10) == "first"
    threading.Timer(0.5, writer.enqueue, ["second"]).start()
    before = time.thread_time()
    assert reader.dequeue(timeout=10) == "second"
    assert time.thread_time() - before < 0.25  # of half a second; polling takes all of it


def test_a_lost_notice_delays_a_message_by_milliseconds(queue, monkeypatch) -> None:
    writer, reader = queue
    monkeypatch.setattr(writer._spin_condition, "notify", lambda: None)
    begun = time.monotonic()
    for number in range(20):
        writer.enqueue(number)
        assert reader.dequeue(timeout=10) == number
    assert time.monotonic() - begun < 4  # by itself a sleeping reader looks every 5 s
