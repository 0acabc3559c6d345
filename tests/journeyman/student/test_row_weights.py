"""Where rows' weights come from, and that they leave the mean loss where it was."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from journeyman.errors import DataError
from journeyman.models import Model
from journeyman.student import row_weights, token_rows
from journeyman.student.classifying import Classifying
from journeyman.student.models import load_tokenizer
from journeyman.student.token_dataset import TokenDataset
from journeyman.teacher.answers import Labeled

from ..labels import synthetic as made
from .conftest import loader, make_recipe, make_rows
from .test_token_rows import text, tokens


def test_the_mean_over_what_is_learned_is_one() -> None:
    sizes = np.array([3, 1, 8])
    found = row_weights.normalised(np.array([0.5, 0.25, 1.0]), sizes)
    assert np.average(found, weights=sizes) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found / found[2], [0.5, 0.25, 1.0])


@pytest.mark.parametrize("raw", [[0.0, 0.0], [np.nan, 1.0]])
def test_weights_that_are_none_are_a_sentence(raw: list[float]) -> None:
    with pytest.raises(DataError, match=r"set training\.row_weight: none"):
        row_weights.normalised(np.array(raw), np.ones(2))


PROBABILITIES = np.random.default_rng(0).dirichlet(np.ones(3), size=24)


def classifier(
    encoder: Model, folder: Path, probabilities: np.ndarray = PROBABILITIES, **training: object
) -> Classifying:
    """With 20 train rows."""
    with np.errstate(divide="ignore"):
        logprobs = np.log(probabilities)
    rows = dataclasses.replace(make_rows(n_train=20, n_calibrate=4), logprobs=logprobs)
    (folder / "rows").write_bytes(pickle.dumps(rows))
    load = loader(make_recipe(**training), encoder.path, folder / "rows")
    return cast(Classifying, load(None, torch.device("cpu")))


def test_a_classifiers_rows_weigh_the_teachers_largest_probability(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    learner = classifier(tiny_encoder, tmp_path, row_weight="confidence")
    sure = PROBABILITIES[:20].max(axis=1)
    assert learner._weights is not None
    np.testing.assert_allclose(learner._weights, sure / sure.mean(), rtol=1e-12)


def test_classes_are_balanced_over_the_teachers_probabilities_on_train_rows(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    def weights(class_weight: object) -> np.ndarray | None:
        found = classifier(tiny_encoder, tmp_path, class_weight=class_weight)._class_weights
        return None if found is None else found.numpy()

    expected = 20 / (3 * PROBABILITIES[:20].sum(axis=0))
    np.testing.assert_allclose(weights("balanced"), expected, rtol=1e-6)
    np.testing.assert_allclose(weights({"kitchen": 2.5}), [1, 2.5, 1])
    assert weights("none") is None


def test_hard_labels_are_balanced_over_the_teachers_choices(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    learner = classifier(tiny_encoder, tmp_path, class_weight="balanced", hard_labels=True)
    chosen = PROBABILITIES[:20].argmax(axis=1)
    np.testing.assert_array_equal(np.exp(learner._train.targets(np.arange(20))), np.eye(3)[chosen])
    assert learner._class_weights is not None
    np.testing.assert_allclose(learner._class_weights, 20 / (3 * np.bincount(chosen)), rtol=1e-6)


def test_a_class_that_no_row_has_cannot_be_balanced(tiny_encoder: Model, tmp_path: Path) -> None:
    without = PROBABILITIES * [1, 0, 1]
    with pytest.raises(DataError, match="the teacher gives kitchen to no train row"):
        classifier(tiny_encoder, tmp_path, without, class_weight="balanced")


def weights_of(
    run: Path, llama: Model, kind: str, labeled: list[Labeled], row_weight: str, **labels: object
) -> np.ndarray:
    """Of the train rows as they are written."""
    settings = made.settings(kind, **labels)
    shard = [(made.row(f"w{i}"), one) for i, one in enumerate(labeled)]
    shard.append((made.row("w40", "calibrate"), labeled[0]))
    codec = None if kind == "rationales" else made.TOP3
    made.write_dataset(run, settings, [shard], codec=codec)
    token_rows.build(
        run / "labels", run / "corpus", settings, load_tokenizer(llama.path), 64, run / "rows",
        as_text=kind == "rationales", row_weight=row_weight,
    )  # fmt: skip
    return TokenDataset(run / "rows" / "train").weights


def test_given_texts_weigh_the_mean_largest_probability(tiny_llama: Model, tmp_path: Path) -> None:
    dense = [made.distributions(n, seed=n) for n in (3, 5)]
    labeled = [dataclasses.replace(made.logits(tokens(len(d) + 1), d), n_prompt_tokens=len(d) + 1)
               for d in dense]  # fmt: skip
    found = weights_of(tmp_path, tiny_llama, "logits", labeled, "confidence")
    np.testing.assert_allclose(found, [d.max(axis=1).mean() for d in dense], atol=2e-3)


def test_answers_weigh_the_geometric_mean_of_their_tokens_probabilities(
    tiny_llama: Model, tmp_path: Path
) -> None:
    labeled = []
    for total, n in ((-1.5, 3), (-0.1, 4)):
        ids = tokens(n)
        said = made.generated(text(ids), ids, made.distributions(n), n_prompt_tokens=1)
        labeled.append(dataclasses.replace(said, output_logprob=total))
    found = weights_of(tmp_path, tiny_llama, "generate", labeled, "confidence")
    np.testing.assert_allclose(found, np.exp([-0.5, -0.025]), rtol=1e-6)


def test_reasonings_weigh_their_agreement_or_their_classes(
    tiny_llama: Model, tmp_path: Path
) -> None:
    labeled: list[Labeled] = [
        made.rationales(["w7", "w7", "w8", None], class_logprobs=np.log([0.8, 0.2])),
        made.rationales(["w7", "w7", "w7", "w7"], class_logprobs=np.log([0.3, 0.7])),
    ]
    found = weights_of(tmp_path / "a", tiny_llama, "rationales", labeled, "agreement")
    np.testing.assert_allclose(found, [0.5, 0.5, 1, 1])
    classes = {"classes": {"a": "A", "b": "B"}}
    found = weights_of(tmp_path / "c", tiny_llama, "rationales", labeled, "confidence", **classes)
    np.testing.assert_allclose(found, [0.8, 0.8, 0.7, 0.7], rtol=1e-6)


def test_an_answer_without_its_probability_is_a_sentence(tiny_llama: Model, tmp_path: Path) -> None:
    ids = tokens(3)
    said = made.generated(text(ids), ids, made.distributions(3), n_prompt_tokens=1)
    with pytest.raises(DataError, match="has no probabilities of its teacher"):
        weights_of(
            tmp_path, tiny_llama, "generate",
            [dataclasses.replace(said, output_logprob=None)], "confidence",
        )  # fmt: skip
