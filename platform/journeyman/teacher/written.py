"""A teacher that has spoken: a column of the corpus holds what it wrote behind each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from journeyman.recipe import Generate, Rationales
from journeyman.teacher.answers import Completion, EmptyTarget, Spoken
from journeyman.teacher.classes import prompting
from journeyman.teacher.prompting import Sampling


class Written:
    """What stands in an engine's place: nothing runs, nothing can die."""

    alive = True

    async def start(self) -> None:
        """There is nothing to start."""

    def close(self) -> None:
        """There is nothing to stop."""


class WrittenSpeaker:
    """A ``tokens.Speaker`` that reads; neither tokens nor distributions come with a text."""

    def __init__(self, labels: Generate | Rationales, column: str) -> None:
        self._prompting = prompting(labels)
        self._column = column

    async def speak(
        self, row: Mapping[str, Any], sampling: Sampling, n: int, k: int | None
    ) -> Spoken:
        """Raises EmptyTarget where the column holds nothing."""
        text = str(row.get(self._column) or "")
        if not text.strip():
            raise EmptyTarget(f"teacher.column: {self._column} is empty for this row.")
        said = Completion(text=text, token_ids=np.zeros(0, np.int32), finish_reason="stop")
        return Spoken(completions=[said], n_prompt_tokens=0, n_output_tokens=0, n_cached_tokens=0)

    def prefix(self, row: Mapping[str, Any]) -> str:
        return self._prompting.render(row).text
