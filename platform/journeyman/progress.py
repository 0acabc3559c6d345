"""A live view for long work: redrawn on a terminal, one plain line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

_PLAIN_INTERVAL_S = 10.0


class LiveLine:
    """``with LiveLine() as line: line.show("label  12/100 rows")``.

    A text of several lines is redrawn as such on a terminal, and joined to one elsewhere.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._shown = ""
        self._next_plain = 0.0

    def show(self, text: str) -> None:
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            drawn = "\n".join(line[:width] for line in text.split("\n"))
            self._write(self._erase() + drawn)
            self._shown = drawn
            return
        if text != self._shown and time.monotonic() >= self._next_plain:
            self._next_plain = time.monotonic() + _PLAIN_INTERVAL_S
            self._write("  ".join(line.strip() for line in text.split("\n")) + "\n")
        self._shown = text

    def close(self) -> None:
        """End the view; on a terminal its last state stays."""
        if self._tty and self._shown:
            self._write("\n")
        self._shown = ""

    def _erase(self) -> str:
        up = self._shown.count("\n")
        return (f"\x1b[{up}A" if up else "") + "\r\x1b[J"

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``4000`` as ``1:06:40``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
