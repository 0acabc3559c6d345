"""What it means that two written answers are one: ``certify.match``."""

from __future__ import annotations

import re
from collections.abc import Callable

from journeyman.labels.quality import same_answer
from journeyman.recipe import Certify, Generate, Rationales
from journeyman.teacher.rationales import parse

Same = Callable[[str, str], bool]


def by_text(settings: Certify, labels: Generate | Rationales) -> Same:
    """Whether two answers are one, by their text or by what ``certify.answer_pattern`` finds in it;
    labels: what was asked. An answer in which it finds nothing is like no other."""
    parsed = _parser(settings, labels)
    if parsed is None:
        return lambda one, other: same_answer(one, other, labels)
    return lambda one, other: parsed(one) is not None and parsed(one) == parsed(other)


def against_gold(
    settings: Certify, labels: Generate | Rationales
) -> Callable[[str | None, str | None], bool]:
    """Whether an answer is the gold one, which may be what the pattern is to find."""
    parsed = _parser(settings, labels)

    def right(answer: str | None, gold: str | None) -> bool:
        if answer is None or gold is None:
            return False
        if parsed is None:
            return same_answer(answer, gold, labels)
        return parsed(answer) is not None and parsed(answer) in (gold.strip(), parsed(gold))

    return right


def _parser(settings: Certify, labels: Generate | Rationales) -> Callable[[str], str | None] | None:
    if settings.answer_pattern is None:
        return None
    pattern = re.compile(settings.answer_pattern)
    number = isinstance(labels, Rationales) and labels.number
    return lambda text: parse(text, pattern, number)[0]
