"""What tasks need and is dear to unpickle, such as a tokenizer: once in each process."""

from __future__ import annotations

import functools
import pickle
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Carried(Generic[T]):
    """Holds a value; in a process that it is pickled to, all tasks are given the same one."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _carried, (pickle.dumps(self.value),)


@functools.lru_cache(maxsize=2)
def _carried(pickled: bytes) -> Carried[Any]:
    return Carried(pickle.loads(pickled))
