"""What a classifier reads of a row: one text, or a pair that its encoder sees side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from journeyman.prompts import Prompt, plain
from journeyman.recipe import Student

Input = str | tuple[str, str]

_AS_IT_IS = "{{ text }}"


class Inputs:
    """The templates of a recipe's student section, over rows."""

    def __init__(self, student: Student) -> None:
        templates = student.templates()
        self._as_it_is = templates == {"student.text": _AS_IT_IS}
        self._prompts = tuple(Prompt(source, where) for where, source in templates.items())

    def of(self, row: Mapping[str, Any]) -> Input:
        """row: its columns, as templates name them."""
        if self._as_it_is:
            text: str = row["text"]
            return text
        first, *second = (plain(prompt.render(row)) for prompt in self._prompts)
        return (first, second[0]) if second else first

    def all(self, rows: Iterable[Mapping[str, Any]]) -> list[Input]:
        return [self.of(row) for row in rows]
