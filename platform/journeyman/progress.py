"""One live line for long work: redrawn on a terminal, printed now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_PLAIN_INTERVAL_S = 10.0


class LiveLine:
    """``with LiveLine() as line: line.show("label  12/100 rows")``."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._shown = ""
        self._next_plain = 0.0

    def show(self, text: str) -> None:
        if self._tty:
            self._write(f"\r\x1b[2K{text}")
        elif text != self._shown and time.monotonic() >= self._next_plain:
            self._next_plain = time.monotonic() + _PLAIN_INTERVAL_S
            self._write(text + "\n")
        self._shown = text

    def close(self, text: str | None = None) -> None:
        """End the line, with a last word where there is one."""
        if self._tty:
            self._write(f"\r\x1b[2K{text or self._shown}\n" if text or self._shown else "")
        elif text and text != self._shown:
            self._write(text + "\n")
        self._shown = ""

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._shown:
            self.close()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``4000`` as ``1:06:40``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
