"""A student that reads pairs, and its exported folder with nothing of ours around it."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from journeyman import recipe
from journeyman.errors import RecipeError
from journeyman.models import Model
from journeyman.recipe import Student
from journeyman.student import models
from journeyman.student.inputs import Inputs
from journeyman.student.models import Classifier
from tests.journeyman.student.conftest import FILLERS, loader, make_recipe, make_rows

PAIR = {"text": "q {{ text }}", "text_pair": "{{ passage }}"}


def pair_recipe() -> recipe.Recipe:
    content = make_recipe().model_dump(mode="json")
    content["student"] |= PAIR
    content["corpus"]["columns"]["meta"] = ["passage"]
    return recipe.parse(content)


def test_templates_make_a_text_or_a_pair_of_a_row():
    row = {"text": "who", "passage": "them <b>", "n": 3}
    assert Inputs(Student(model="m")).of(row) == "who"
    assert Inputs(Student(model="m", text="{{ n }}: {{ text }}")).of(row) == "3: who"
    assert Inputs(Student(model="m", **PAIR)).of(row) == ("q who", "them <b>")


def test_the_exported_folder_answers_alike_by_transformers_alone(
    tmp_path: Path, tiny_encoder: Model
):
    rows = make_rows(12, 8)
    random = np.random.default_rng(0)
    passages = [" ".join(random.choice(FILLERS, size=i % 9 + 1)) for i in range(len(rows))]
    rows = replace(rows, metas=[{"passage": passage} for passage in passages])
    (tmp_path / "rows").write_bytes(pickle.dumps(rows))
    learner = loader(pair_recipe(), tiny_encoder.path, tmp_path / "rows")(None, torch.device("cpu"))
    learner.write(models.copy_on_cpu(learner.module), tmp_path / "student")

    inputs = Inputs(pair_recipe().learner()).all(rows.columns)
    ours = Classifier.load(tmp_path / "student").logits(inputs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    firsts, seconds = map(list, zip(*inputs, strict=True))
    tokens = tokenizer(firsts, seconds, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        theirs = model(**tokens).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # of values that differ by 1e-4
    separators = (tokens["input_ids"] == tokenizer.sep_token_id).sum(dim=1)
    assert (separators == 2).all()
    assert tokens["input_ids"].shape[1] <= 16
    alone = Classifier.load(tmp_path / "student").logits(firsts)
    assert np.abs(ours - alone).max() > 5e-5  # the second text is read


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"kind": "causal", "text_pair": "{{ passage }}"}, "text and text_pair go with kind"),
        ({"text": "{{ label }}"}, "the template names label, but a row has only text, passage"),
        ({"text_pair": "{{ document }}"}, "student.text_pair: the template names document"),
    ],
)
def test_templates_that_no_row_can_fill_are_refused(student: dict, words: str):
    from journeyman import corpus

    content = pair_recipe().model_dump(mode="json")
    content["student"] = {"model": "m"} | student
    with pytest.raises(RecipeError, match=words):
        corpus.id_columns(recipe.parse(content))
