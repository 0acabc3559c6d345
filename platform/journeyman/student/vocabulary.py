"""Whether a student's tokens are its teacher's, and whether both read the same prompt."""

from __future__ import annotations

from pathlib import Path

from journeyman.student import architecture
from journeyman.student.models import load_tokenizer


def other_vocabulary(student: Path, teacher: Path) -> str:
    """Why the student cannot learn the teacher's tokens; empty if each token is the same one.

    Both are folders with a tokenizer; all of the teacher's tokens count, added ones too.
    """
    theirs = sorted(load_tokenizer(teacher).get_vocab().items(), key=lambda item: item[1])
    ours = load_tokenizer(student).get_vocab()
    for token, number in theirs:
        if ours.get(token) != number:
            known = f"{ours[token]}" if token in ours else "no token"
            return f"{token!r} is {number} to the teacher and {known} to the student"
    if not (student / "config.json").is_file():
        return ""
    n_outputs = architecture.read_config(student).get_text_config(decoder=True).vocab_size
    token, number = theirs[-1]
    if number >= n_outputs:
        return f"{token!r} is {number}, and the student's model ends at {n_outputs - 1}"
    return ""


def other_prompt(student: Path, teacher: Path, *, chat: bool) -> str:
    """Why the student would read a prompt otherwise than the teacher; empty if it would not.

    For tokenizers of one vocabulary. chat: whether prompts are chats.
    """
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    if chat and ours.chat_template != theirs.chat_template:
        return "its chat template is not the teacher's"
    if ours.encode("") != theirs.encode(""):
        return f"it begins texts with {ours.encode('')}, and the teacher with {theirs.encode('')}"
    return ""
