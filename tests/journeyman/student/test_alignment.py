"""Where two tokenizers are about to go on from the same place, against decoded beginnings."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from journeyman.student.alignment import aligned

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich\n\nund weiter ",
    "数学 is 🧮👩🏽‍🔬 fun;\tπ ≈ 3.14159, isn't it?",
    "",
    "x",
]


def byte_pairs(vocab_size: int, lower: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def pieces(vocab_size: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer that writes spaces in front of words, as SentencePiece does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "</s>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def beginnings(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """What stands before each token, without white space."""
    return ["".join(tokenizer.decode(ids[:i], skip_special_tokens=True).split())
            for i in range(len(ids))]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sizes", [(262, 400), (400, 262), (300, 300)])
def test_tokens_that_begin_behind_the_same_text_are_each_others(
    sizes: tuple[int, int], text: str
) -> None:
    student, teacher = map(byte_pairs, sizes)
    ours, theirs = (
        [*t.encode(text, add_special_tokens=False), t.eos_token_id] for t in (student, teacher)
    )
    found = aligned(student, ours, teacher, theirs)
    before, other = beginnings(student, ours), beginnings(teacher, theirs)
    expected = []
    for i, beginning in enumerate(before):
        whole = not beginning.endswith("\ufffd") and beginning not in before[:i]
        expected.append(other.index(beginning) if whole and beginning in other else -1)
    assert found.tolist() == expected
    assert found[0] == 0
    if text.strip() == text:  # else the first of two ends stands before the white space
        assert found[-1] == len(theirs) - 1


def test_one_tokenizer_is_aligned_with_itself() -> None:
    tokenizer = byte_pairs(400)
    ids = tokenizer.encode("The quick brown fox")
    np.testing.assert_array_equal(aligned(tokenizer, ids, tokenizer, ids), np.arange(len(ids)))


def test_spaces_may_belong_to_either_token() -> None:
    student, teacher = pieces(90), byte_pairs(400)
    ours, theirs = student.encode(TEXTS[0]), teacher.encode(TEXTS[0])
    found = aligned(student, ours, teacher, theirs)
    starts = beginnings(student, ours)
    words = ("", "The", "Thequick", "Thequickbrown")
    other = beginnings(teacher, theirs)
    for word in words:
        assert found[starts.index(word)] == other.index(word)


def test_changed_text_is_aligned_up_to_its_change() -> None:
    student, teacher = byte_pairs(262, lower=True), byte_pairs(262)
    text = "so it is: The quick"
    found = aligned(student, student.encode(text), teacher, teacher.encode(text))
    reached = beginnings(student, student.encode(text))[int(np.flatnonzero(found >= 0)[-1])]
    assert reached == "soitis:"
