"""Two tokenisations of one text: where both are about to go on from the same place.

Only there do two language models of different vocabularies predict the same thing: what follows the
same characters. Knows tokenizers, nothing of losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT_CHARACTER = "\ufffd"
_LONGEST_CHARACTER = 8  # tokens: behind so many, the replacement character is the text's own


def aligned(
    student: PreTrainedTokenizerBase,
    student_ids: Sequence[int],
    teacher: PreTrainedTokenizerBase,
    teacher_ids: Sequence[int],
) -> np.ndarray:
    """int64[n]: for each token of the student, the teacher's one that begins behind the same
    characters; -1 where none does, inside a character, and where one side has changed the text.

    White space does not count, as tokenizers differ in which token it belongs to; of several
    tokens that begin behind the same characters, the first ones are meant.
    """
    text, begins = _spelled(student, student_ids)
    other_text, other_begins = _spelled(teacher, teacher_ids)
    differ = (i for i, (a, b) in enumerate(zip(text, other_text, strict=False)) if a != b)
    n_same = next(differ, min(len(text), len(other_text)))
    found = np.full(len(begins), -1)
    common, ours, theirs = np.intersect1d(begins, other_begins, return_indices=True)
    both = (common >= 0) & (common <= n_same)
    found[ours[both]] = theirs[both]
    return found


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, np.ndarray]:
    """The text without white space; int64[n], characters of it before each token, -1 inside one.

    A window of two steps is decoded at a time, since what a token spells depends on the one before.
    """
    begins = np.full(len(ids) + 1, -1)
    begins[0] = length = 0
    pieces: list[str] = []
    window = read = 0
    for end in range(1, len(ids) + 1):
        before, now = _decoded(tokenizer, ids[window:read]), _decoded(tokenizer, ids[window:end])
        if now.endswith(_CUT_CHARACTER) and end - read < _LONGEST_CHARACTER:
            continue
        pieces.append("".join(now[len(before) :].split()))
        length += len(pieces[-1])
        begins[end] = length
        window, read = read, end
    return "".join(pieces), begins[:-1]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Without special tokens: an end is written differently everywhere, and says nothing."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
