"""Which steps a recipe has."""

from journeyman import recipe, steps
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
