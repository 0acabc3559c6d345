"""An idle engine core begins with whole rows: on vLLM's own loop, with requests put by hand."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace

import pytest

from journeyman.teacher import lifeline, siblings


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch):
    from vllm.v1.engine.core import EngineCoreProc

    stock = EngineCoreProc._process_input_queue
    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", stock)  # and puts it back
    monkeypatch.setenv(lifeline.PARENT, "1")
    monkeypatch.setattr(siblings, "_AT_MOST_S", 30.0)  # however slow this machine is
    siblings.begin_together()
    assert EngineCoreProc._process_input_queue is not stock

    class Core(EngineCoreProc):
        """What the loop needs of one, without a model."""

        def __init__(self) -> None:
            self.input_queue, self.aborts_queue = queue.Queue(), queue.Queue()
            self.scheduler = SimpleNamespace(requests={})
            self.process_input_queue_block = True

        def has_work(self) -> bool:
            return bool(self.scheduler.requests)

        def is_running(self) -> bool:
            return True

        def _notify_idle_state_callbacks(self) -> None:
            pass

        def _handle_client_request(self, name: str, request: SimpleNamespace) -> None:
            self.scheduler.requests[name] = request

        def come(self, *names: str, of: int) -> None:
            for name in names:
                mark = {siblings.SIBLINGS: [ord(name[0]), of]}  # its letter is the row's
                params = SimpleNamespace(extra_args=mark if of > 1 else None)
                self.input_queue.put((name, SimpleNamespace(sampling_params=params)))

    return Core()


def later(core, *names: str, of: int) -> None:
    """In some milliseconds, one behind the other."""

    def come() -> None:
        for name in names:
            time.sleep(0.002)
            core.come(name, of=of)

    threading.Thread(target=come).start()


def test_a_row_begins_with_its_last_prompt(core) -> None:
    core.come("a1", of=4)
    later(core, "a2", "a3", "a4", of=4)
    core._process_input_queue()
    assert sorted(core.scheduler.requests) == ["a1", "a2", "a3", "a4"]


def test_so_does_each_of_two_that_come_mixed(core) -> None:
    core.come("a1", "b1", of=3)
    core.come("c1", "c2", of=2)
    later(core, "a2", "b2", "b3", "a3", of=3)
    core._process_input_queue()
    assert len(core.scheduler.requests) == 8


def test_a_prompt_that_stands_alone_waits_for_nothing(core) -> None:
    core.come("alone", of=1)
    begun = time.monotonic()
    core._process_input_queue()
    assert time.monotonic() - begun < siblings._AT_MOST_S / 2
    assert list(core.scheduler.requests) == ["alone"]


def test_one_that_never_comes_is_not_waited_for_long(core, monkeypatch) -> None:
    monkeypatch.setattr(siblings, "_AT_MOST_S", 0.02)
    core.come("a1", "a2", "a3", of=4)
    begun = time.monotonic()
    core._process_input_queue()
    assert siblings._AT_MOST_S <= time.monotonic() - begun < 2
    assert len(core.scheduler.requests) == 3


def test_an_engine_at_work_does_not_wait(core) -> None:
    core.scheduler.requests["running"] = SimpleNamespace(sampling_params=None)
    core.come("a1", of=4)
    begun = time.monotonic()
    core._process_input_queue()
    assert time.monotonic() - begun < siblings._AT_MOST_S / 2
    assert len(core.scheduler.requests) == 2
