"""Which steps a recipe has."""

import pytest

from journeyman import recipe, steps
from journeyman.errors import RecipeError
from tests.conftest import DEMO, ROOT

CLASSES = recipe.load(DEMO)
GENERATE = {"kind": "generate", "prompt": "{{ text }}"}


def test_labels_alone_need_no_student():
    alone = CLASSES.model_copy(update={"student": None})
    assert steps.names(alone) == ("prepare", "label")


def test_students_end_with_a_page_and_one_that_writes_is_certified_when_asked():
    assert steps.names(CLASSES) == steps.NAMES
    changes = {
        "labels": recipe.Generate.model_validate(GENERATE),
        "student": CLASSES.learner().model_copy(update={"kind": "causal"}),
    }
    writes = CLASSES.model_copy(update=changes)
    assert steps.names(writes) == ("prepare", "label", "train", "report")
    completes = recipe.load(ROOT / "jobs" / "recipes" / "logits.yaml")
    assert steps.names(completes) == ("prepare", "label", "train", "certify", "report")
    stored = completes.model_copy(update={"output": "s3://bucket/runs"})
    assert steps.names(stored) == ("prepare", "label", "train", "report")


def test_what_cannot_be_certified_is_said_before_labels_are_paid_for():
    logits = ROOT / "jobs" / "recipes" / "logits.yaml"
    steps.check(recipe.load(logits))
    neither = recipe.load(logits, ["certify.complete={max_tokens: 2}"])
    with pytest.raises(RecipeError, match=r"certify\.complete: give words where nothing"):
        steps.check(neither)
