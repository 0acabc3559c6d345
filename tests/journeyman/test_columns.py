"""Rows of several columns as the texts that a cascade carries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.columns import packed, unpacked
from journeyman.errors import DataError

TEXT = st.text(min_size=1).filter(str.strip)


@given(TEXT, st.text())
def test_what_was_packed_comes_back(text: str, passage: str):
    columns = ("passage", "text")
    row = {"text": text, "passage": passage}
    assert unpacked(packed(row, columns), columns) == row
    assert packed(dict(reversed(row.items())), columns) == packed(row, columns)


@given(TEXT)
def test_a_text_alone_stays_as_it_is(text: str):
    assert packed(text, ("text",)) == packed({"text": text}, ("text",)) == text
    assert unpacked(text, ("text",)) == {"text": text}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("secret", "an object with the columns passage, text is needed, and a text was sent"),
        ({"text": "secret"}, "column passage is missing; needed are passage, text"),
        ({"text": "a", "passage": "b", "secret": "c"}, "other columns than passage, text"),
        ({"text": " ", "passage": "secret"}, "column text is blank"),
    ],
)
def test_other_columns_are_refused_in_words_that_hold_nothing_of_the_row(row, sentence: str):
    with pytest.raises(DataError, match=sentence) as caught:
        packed(row, ("passage", "text"))
    assert "secret" not in str(caught.value)
