"""What the teacher is asked about a row: one task for each kind of label.

Used alike by labeling and by serving, so that both score a text the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from journeyman.errors import RecipeError
from journeyman.recipe import Classes, Generate, Labels, Logits, Rationales, digest
from journeyman.teacher.answers import Labeled

if TYPE_CHECKING:
    from journeyman.teacher.remembered import Remembered
    from journeyman.teacher.remote import RemoteTeacher
    from journeyman.teacher.scorer import Scorer


class Task(Protocol):
    """One kind of label, bound to its teacher."""

    requests_per_row: int  # that the teacher has at a time

    async def run(self, row: Mapping[str, Any], seed: int = 0) -> Labeled:
        """Label one row, given its columns; raises RowError, and whatever the teacher raises.

        seed: 64 bits of the row's own, which decide its draws.
        """
        ...

    def prefix(self, row: Mapping[str, Any]) -> str:
        """What the teacher reads of a row, from its beginning: rows in the order of this share
        their prefixes with their neighbours."""
        ...


def local(labels: Labels, engine: Scorer, remembered: Remembered | None = None) -> Task:
    """The task of a recipe's labels section, on an engine of ours; raises RecipeError.

    remembered: of this engine, where equal targets are to be scored once.
    """
    from journeyman.teacher import classes, rationales, tokens

    if isinstance(labels, Classes):
        return classes.ClassTask(labels, engine, remembered)
    if isinstance(labels, Logits):
        return tokens.LogitTask(labels, engine)
    if isinstance(labels, Generate):
        return tokens.GenerateTask(labels, tokens.LocalSpeaker(labels, engine))
    return rationales.RationaleTask(labels, tokens.LocalSpeaker(labels, engine), engine)


def remote(labels: Labels, teacher: RemoteTeacher) -> Task:
    """The same for a teacher behind a URL; raises RecipeError for what no API gives."""
    from journeyman.teacher import classes, rationales, tokens

    check_remote(labels)
    if isinstance(labels, Classes):
        return classes.RemoteClassTask(labels, teacher)
    if isinstance(labels, Generate):
        return tokens.GenerateTask(labels, tokens.RemoteSpeaker(labels, teacher))
    assert isinstance(labels, Rationales)
    return rationales.RationaleTask(labels, tokens.RemoteSpeaker(labels, teacher), None)


def written(labels: Labels, column: str) -> Task:
    """The same for a teacher whose words a column holds."""
    from journeyman.teacher import rationales, tokens
    from journeyman.teacher.written import WrittenSpeaker

    if isinstance(labels, Generate):
        return tokens.GenerateTask(labels, WrittenSpeaker(labels, column))
    assert isinstance(labels, Rationales)  # the recipe sees to it
    return rationales.RationaleTask(labels, WrittenSpeaker(labels, column), None)


def check_remote(labels: Labels) -> None:
    """Raises RecipeError where an OpenAI-compatible API cannot give what is asked."""
    lacking = {
        "logits": isinstance(labels, Logits),
        "scoring: channel": isinstance(labels, Classes) and labels.scoring == "channel",
        "scoring: verbalizer": isinstance(labels, Classes) and labels.scoring == "verbalizer",
        "classes behind a reasoning": isinstance(labels, Rationales) and bool(labels.classes),
    }
    for what, asked in lacking.items():
        if asked:
            raise RecipeError(
                f"labels: {what} needs the probabilities of given text, which an OpenAI-compatible "
                "API does not give; run the teacher on an engine of ours (leave teacher.url out)."
            )


def prompt_digest(labels: Labels) -> str:
    """Digest of all that decides what the teacher says: templates, words, scoring, sampling."""
    return digest(labels.asked())


def row_values(text: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """A row's columns as templates see them."""
    return {**meta, "text": text}
