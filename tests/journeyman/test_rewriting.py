"""Settings written into a recipe's file: the rest of it stays as it was."""

import pytest
import yaml

from journeyman.errors import RecipeError
from journeyman.recipe.rewriting import with_settings
from tests.conftest import DEMO

SOURCE = """\
# what this is
name: mine   # my own

labels:
  # how the teacher is asked
  scoring: direct  # one prefill
  classes:
    a: " a"

    b: " b"   # the second

  # the prompt is long
  prompt: |
    Say a
    or b.

    {{ text }}

training:   # below
  epochs: 4
"""


def test_only_what_changes_changes():
    changes = {"scoring": "channel", "prompt": "One {{ label }}\ntwo\n", "chat": False}
    got = with_settings(SOURCE, ("labels",), changes, ["taken:", "  b: .9"])
    assert yaml.safe_load(got)["labels"] == yaml.safe_load(SOURCE)["labels"] | changes
    kept = [line for line in got.split("\n") if line in SOURCE.split("\n")]
    gone = [line for line in SOURCE.split("\n") if line not in kept]
    assert gone == ["  scoring: direct  # one prefill", "    Say a", "    or b.", "    {{ text }}"]
    assert "  # was: scoring: direct  # one prefill" in got
    assert "  # was: Say a" in got
    assert "  # taken:\n  #   b: .9\n" in got
    assert "  prompt: |\n    One {{ label }}\n    two\n" in got


def test_no_change_still_tells_the_evidence():
    got = with_settings(SOURCE, ("labels",), {}, ["taken: recipe"])
    assert yaml.safe_load(got) == yaml.safe_load(SOURCE)
    assert got.replace("  # taken: recipe\n", "") == SOURCE


@pytest.mark.parametrize("value", ["a: b #c", "ü {{ text }}", " x\n\n  y \n", {"a": ["p", "q: r"]}])
def test_values_come_back_as_they_were_meant(value):
    for source in (SOURCE, DEMO.read_text()):
        got = with_settings(source, ("labels",), {"prompt": value, "new": value}, [])
        assert yaml.safe_load(got)["labels"]["prompt"] == value
        assert yaml.safe_load(got)["labels"]["new"] == value
        assert yaml.safe_load(got)["training"] == yaml.safe_load(source)["training"]


def test_a_section_in_one_line_is_left_alone_and_the_lines_are_told():
    with pytest.raises(RecipeError, match=r"put there by hand:\n  scoring: channel"):
        with_settings("labels: {scoring: direct}\n", ("labels",), {"scoring": "channel"}, [])
    with pytest.raises(RecipeError, match="by hand"):
        with_settings("name: x\n", ("labels",), {"scoring": "channel"}, [])


def test_a_section_in_a_section_changes_alone():
    candidates = "  candidates:\n    x:  # one\n      k: 1\n    y: {k: 2}\n"
    source = SOURCE.replace("  classes:", f"{candidates}  classes:")
    got = with_settings(source, ("labels", "candidates", "x"), {"chat": True}, [])
    assert got == source.replace("      k: 1\n", "      k: 1\n      chat: true\n")
    got = with_settings(source, ("labels", "candidates", "y"), {"chat": True}, [])
    assert yaml.safe_load(got)["labels"]["candidates"]["y"] == {"k": 2, "chat": True}
    assert "x:  # one\n      k: 1\n    # was: y: {k: 2}\n    y:\n" in got
    got = with_settings(SOURCE, ("labels", "candidates"), {"z": {"k": 3}}, [])
    assert yaml.safe_load(got)["labels"]["candidates"] == {"z": {"k": 3}}
    assert set(SOURCE.split("\n")) <= set(got.split("\n"))
