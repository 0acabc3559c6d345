"""What each token adds to an answer, by tokenizers of both families."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from journeyman.teacher.pieces import Pieces, fitted

WORDS = ["a", "b", "ab", "ba", "\u2581", "\u2581a", "\u2581ab", "\u2581ba", "."]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def marking_blanks() -> PreTrainedTokenizerFast:
    """As SentencePiece does: a blank is part of the token behind it, and bytes stand for what no
    token has."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", *WORDS, *BYTES])}
    model = models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "a")], byte_fallback=True,
                       unk_token="<unk>")  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def of_bytes() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZERS = [marking_blanks(), of_bytes()]


def test_blanks_stay_where_an_answer_is_cut():
    tokenizer = TOKENIZERS[0]
    ids = tokenizer.convert_tokens_to_ids(["\u2581ab", "\u2581a", "b", "\u2581ba", "."])
    assert [tokenizer.decode([token]) for token in ids] == ["ab", "a", "b", "ba", "."]
    assert Pieces(tokenizer.decode).add(ids) == ("ab", " a", "b", " ba", ".")


@given(st.sampled_from(TOKENIZERS), st.text(alphabet="ab. \u00e9\u20ac\U0001f600", max_size=20))
def test_pieces_of_a_text_are_the_text_and_so_are_its_beginnings(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, so_far = Pieces(tokenizer.decode), ""
    for end, token in enumerate(ids, 1):
        [piece] = pieces.add([token])
        so_far += piece
        decoded = tokenizer.decode(ids[:end])
        assert so_far == decoded or decoded.endswith("\ufffd")  # within a character
    assert so_far == tokenizer.decode(ids) and not pieces.rest()


@pytest.mark.parametrize(
    ("pieces", "text", "wholly_in_it"),
    [
        (("ab", " a", "."), "ab a.", 3),
        (("ab", " a", ".", "\n", "b"), "ab a", 2),  # the stop string is of two tokens,
        (("ab", " a.", "."), "ab a", 1),  # within one,
        (("ab", ".b"), "", 0),  # all there is
        (("a", "", "\u20ac"), "a", 1),  # what begins a character is not in it without the character
        (("a", "", "\u20ac"), "a\u20ac", 3),
    ],
)
def test_tokens_of_what_stands_in_front_of_a_stop_string(pieces, text: str, wholly_in_it: int):
    assert fitted(pieces, text) == pieces[:wholly_in_it]


@given(st.lists(st.sampled_from(WORDS[5:]), min_size=1, max_size=6), st.data())
def test_an_engines_text_behind_a_prompt_has_the_blank_that_its_first_token_marks(words, data):
    """What vLLM's text begins with, since it decodes behind the prompt's tokens."""
    tokenizer = TOKENIZERS[0]
    ids = tokenizer.convert_tokens_to_ids(words)
    prompt = tokenizer.convert_tokens_to_ids(["a"])
    behind = tokenizer.decode(prompt + ids).removeprefix("a")
    pieces = Pieces(tokenizer.decode).add(ids)
    n = data.draw(st.integers(0, len(words)))
    text = "".join(word.replace("\u2581", " ") for word in words[:n])
    assert behind.startswith(text)
    kept = fitted(pieces, text)
    assert "".join(kept) == text and len(kept) == n


@given(st.lists(st.integers(0, 255), max_size=12))
def test_what_is_no_text_is_told_in_the_end(numbers):
    tokenizer = TOKENIZERS[1]
    pieces = Pieces(tokenizer.decode)
    assert "".join(pieces.add(numbers)) + pieces.rest() == tokenizer.decode(numbers)
