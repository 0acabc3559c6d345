"""Many of Ray Data's actors in few processes, so that a driver has a thousand of them on a laptop.

Ray Data's own pool runs in the driver, with a handle of its own for every actor: it starts, ranks,
gives out and waits as it does for actors that are processes. Only what is behind a handle is
shared: a host, which is an actor of Ray and keeps the workers of many handles, with as many
threads as they would have together.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray
import ray.data
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

N_HOSTS = 8


@contextlib.contextmanager
def hosted() -> Iterator[None]:
    """Datasets that are executed within have their actors in hosts, which end with it."""
    start_one = ActorPoolMapOperator._start_actor
    hosts: list[Any] = []

    def start(operator: Any, *arguments: Any) -> Any:
        if not isinstance(operator._actor_cls, _Handles):
            operator._actor_cls = _Handles(operator, hosts)
        return start_one(operator, *arguments)

    with mock.patch.object(ActorPoolMapOperator, "_start_actor", start):
        yield
    for host in hosts:
        ray.kill(host)


class _Handles:
    """Stands in for an operator's class of actors."""

    def __init__(self, operator: Any, hosts: list[Any]) -> None:
        pool, options = operator._actor_pool, dict(operator._ray_remote_args)
        each = pool.max_tasks_in_flight_per_actor()
        options["max_concurrency"] = each * -(-pool.max_size() // N_HOSTS)
        host = ray.remote(**options)(_Host)
        hosts += [host.remote(operator._map_worker_cls, pool.max_actor_concurrency())
                  for _ in range(min(N_HOSTS, pool.max_size()))]  # fmt: skip
        self._hosts = itertools.cycle(hosts)
        self._numbers = itertools.count()

    def options(self, **_: Any) -> _Handles:
        return self

    def remote(self, **arguments: Any) -> _Handle:
        return _Handle(next(self._hosts), next(self._numbers), arguments)


class _Handle:
    """What a pool holds of an actor, and calls of it."""

    def __init__(self, host: Any, number: int, arguments: dict[str, Any]) -> None:
        self._host, self._number = host, number
        self.get_location = _Method(host.start, (number,), arguments)
        self.submit = _Method(host.submit, (number,), {})

    def _get_local_state(self) -> Any:
        return self._host._get_local_state()


class _Method:
    def __init__(self, method: Any, first: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._method, self._first, self._named = method, first, named

    def options(self, **options: Any) -> _Method:
        return _Method(self._method.options(**options), self._first, self._named)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self._method.remote(*self._first, *arguments, **self._named, **named)


class _Host:
    """An actor that keeps the workers of many handles."""

    def __init__(self, worker: type, n_calls: int) -> None:
        self._worker, self._n_calls = worker, n_calls
        self._workers: dict[int, SimpleNamespace] = {}

    def start(self, number: int, **arguments: Any) -> str:
        _here.waits = []
        with _starting:
            ray.data._map_actor_context = None
            worker = self._worker(**arguments)
            context, ray.data._map_actor_context = ray.data._map_actor_context, _ContextOfThread()
        for wait in _here.waits:
            wait()
        self._workers[number] = SimpleNamespace(
            submit=worker.submit, context=context, free=threading.Semaphore(self._n_calls)
        )
        return worker.get_location()

    def submit(self, number: int, *arguments: Any, **named: Any) -> Iterator[Any]:
        worker = self._workers[number]
        with worker.free:
            _here.context = worker.context
            yield from worker.submit(*arguments, **named)


# Ray Data keeps one context a process, where a worker finds its user's function.
_starting, _here = threading.Lock(), threading.local()


class _ContextOfThread:
    is_async = False

    @property
    def udf_instances(self) -> Any:
        return _here.context.udf_instances


def at_the_end_of_start(wait: Callable[[], None]) -> None:
    """For what blocks while a worker is made, which in a host is one at a time."""
    if hasattr(_here, "waits"):
        _here.waits.append(wait)
    else:
        wait()
