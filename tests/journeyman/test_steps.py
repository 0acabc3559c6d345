"""Which steps a recipe has."""

import pytest

from journeyman import recipe, steps
from journeyman.errors import RecipeError
from tests.conftest import DEMO

CLASSES = recipe.load(DEMO)
GENERATE = {"kind": "generate", "prompt": "{{ text }}"}


def test_labels_alone_need_no_student():
    alone = CLASSES.model_copy(update={"student": None})
    assert steps.names(alone) == ("prepare", "label")


def test_a_classifier_ends_with_a_report_and_a_student_that_writes_with_itself():
    assert steps.names(CLASSES) == steps.NAMES
    writes = CLASSES.model_copy(update={"labels": recipe.Generate.model_validate(GENERATE)})
    assert steps.names(writes) == ("prepare", "label", "train")


def test_a_page_of_a_student_that_writes_is_refused_with_what_draws_it_instead():
    writes = CLASSES.model_copy(update={"labels": recipe.Generate.model_validate(GENERATE)})
    with pytest.raises(RecipeError, match=r"compare runs/\w+ --plot FILE draws it"):
        steps.Run(writes).execute("report")
