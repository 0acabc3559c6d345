"""Errors of a request without their words, which may quote its text and would be logged by Serve,
Ray and traces: handed on are their kind and their place."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Iterator
from pathlib import PurePath
from typing import TypeVar

T = TypeVar("T")

_FRAMES = 8  # the innermost
_CHAIN = 4  # errors, each raised for the next


class Failed(Exception):  # noqa: N818 - stands for an error of any kind
    """kind: of error, the name of its type; places: files and lines, the innermost first."""

    def __init__(self, kind: str, places: str) -> None:
        super().__init__(kind, places)
        self.kind, self.places = kind, places

    def __str__(self) -> str:
        return f"{self.kind} at {self.places}"


def failed(error: BaseException) -> Failed:
    """What may be told of it. Raise it outside of ``except``, else it is chained to the error."""
    if isinstance(error, Failed):
        return error
    first, *others = [(type(one).__name__, _places(one)) for one in _chained(error)]
    kind, places = first
    return Failed(kind, "; for ".join([places, *(f"{of} at {where}" for of, where in others)]))


async def without_words(work: Awaitable[T], *but: type[Exception]) -> T:
    """Its result; raises Failed in place of any error but these."""
    try:
        return await work
    except but:
        raise
    except Exception as error:
        told = failed(error)
    raise told


def _chained(error: BaseException) -> Iterator[BaseException]:
    for _ in range(_CHAIN):
        yield error
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None:
            return
        error = before


def _places(error: BaseException) -> str:
    frames = [*traceback.walk_tb(error.__traceback__)][-_FRAMES:]
    return " < ".join(
        f"{'/'.join(PurePath(frame.f_code.co_filename).parts[-2:])}:{line}"
        for frame, line in reversed(frames)
    )
