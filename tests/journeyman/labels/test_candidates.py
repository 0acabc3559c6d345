"""Candidates side by side: figures against plain loops, and a refusal that spoils no other way."""

import numpy as np
import pytest

from journeyman.cli.trying import side_by_side
from journeyman.labels.candidates import Asked, best, judge
from journeyman.labels.replica import Counts, Replica
from journeyman.labels.trying import OWN, _Trying, ways
from journeyman.probabilities import area_under_roc
from journeyman.prompts import plain
from journeyman.recipe import Classes, Price
from tests.conftest import small_recipe


def labels(**changes: object) -> Classes:
    own = {"classes": {"no": " no", "yes": " yes"}, "prompt": "{{ text }}"}
    return Classes.model_validate(own | {"prior_correction": "none"} | changes)


def asked(p_yes: list[float], places: list[int] | None = None, **changes: object) -> Asked:
    p = np.array(p_yes)
    facts = {
        "place": np.array(places if places is not None else range(len(p))),
        "logprobs": np.log(np.stack([1 - p, p], axis=1)),
        "label_mass": 0.5,
        "counts": Counts(rows=len(p), prompt_tokens=90, output_tokens=10, replica_seconds=36.0),
    }
    return Asked(**facts | changes)


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert area_under_roc(scores, positive) == pytest.approx(np.mean(pairs))
    assert area_under_roc(scores, np.ones(60, bool)) is None


def test_figures_are_against_gold_and_per_row():
    gold = np.array([1, 1, 0, 0, -1])
    said = {"a": asked([0.9, 0.4, 0.2, 0.1, 0.7]), "b": asked([0.1, 0.6, 0.3, 0.8], [0, 1, 2, 4])}
    price = Price(per_replica_hour=10.0, per_million_prompt_tokens=1.0)
    a, b = judge({"a": labels(), "b": labels(scoring="verbalizer")}, said, gold, price)
    assert (a.accuracy.k, a.accuracy.n, a.balanced_accuracy, a.auc) == (3, 4, 0.75, 1.0)
    assert (b.accuracy.k, b.accuracy.n, b.unanswered, b.auc) == (2, 3, 1, 0.5)
    assert a.agreement == b.agreement == 2 / 4  # of the rows that both answer
    assert a.tokens_per_row == 20 and a.dollars_per_row == pytest.approx((0.1 + 90e-6) / 5)
    assert a.calibration_error == pytest.approx((0.1 + 0.6 + 0.2 + 0.1) / 4)
    assert best([a, b]) is a and best([b]) is b


def test_the_prior_is_taken_out_without_gold():
    tilted = asked([0.95, 0.9, 0.7, 0.6])
    gold = np.array([1, 1, 0, 0])
    corrected, raw = judge(
        {"batch": labels(prior_correction="batch"), "raw": labels()},
        {"batch": tilted, "raw": tilted},
        gold,
        Price(),
    )
    assert (corrected.accuracy.rate, raw.accuracy.rate) == (1.0, 0.5)
    assert "1.000" in side_by_side([corrected, raw])


def test_without_gold_they_are_compared_with_one_another_and_it_says_so():
    gold = np.full(4, -1)
    said = {
        "a": asked([0.9, 0.9, 0.1, 0.1]),
        "b": asked([0.8, 0.7, 0.2, 0.6]),
        "c": asked([0.1, 0.2, 0.9, 0.1]),
    }
    judged = judge(dict.fromkeys(said, labels()), said, gold, Price())
    assert [one.agreement for one in judged] == [0.5, 0.375, 0.125]
    assert best(judged) is judged[0]
    assert "No gold labels" in side_by_side(judged) and judged[0].accuracy is None
    assert best(judged[:2]) is None  # who is right of two that differ, nobody says


def test_where_a_label_is_rare_the_best_order_is_the_best():
    gold = np.array([1] * 8 + [0] * 2)
    said = {
        "never": asked([0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 0.6, 0.6, 0.7, 0.7]),
        "orders": asked([0.9, 0.9, 0.9, 0.9, 0.9, 0.4, 0.4, 0.4, 0.2, 0.2]),
    }
    never, orders = judge(dict.fromkeys(said, labels()), said, gold, Price())
    assert never.accuracy.rate == 0.8 > orders.accuracy.rate == 0.7 and orders.auc == 1
    three = labels(classes={"a": " a", "b": " b", "c": " c"})
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])
    of_three = {"x": Asked(place=np.arange(4), logprobs=np.log(p), label_mass=0.5,
                           counts=Counts(rows=4))}  # fmt: skip
    (by_c,) = judge({"x": three}, of_three, np.array([0, 1, 2, 2]), Price(), "c")
    assert by_c.auc == area_under_roc(p[:, 2], np.array([0, 0, 1, 1]) == 1) == 0.5
    assert best([never, orders]) is never and best([never, orders], by_order=True) is orders


def test_each_way_is_asked_of_one_engine_as_labeling_asks_it(replica: Replica):
    recipe = small_recipe(
        replica._spec.corpus_dir,
        "labels.candidates={short: {prompt: 'About {{ label }}:'}, direct: {scoring: direct, "
        "prompt: '{{ text }}'}}",
    )
    trying = _Trying(recipe.teacher, replica._spec.model, {})
    trying._backend = replica._backend
    rows = [{"text": "pay my bill"}, {"text": "a flight"}, {"text": "x " * 600}, {"text": "eggs"}]
    said = {name: replica._call(trying._ask(way, rows)) for name, way in ways(recipe).items()}
    assert "choose a shorter word" in said["direct"].refusal
    for name, way in (("short", ways(recipe)["short"]), (OWN, recipe.classes())):
        assert said[name].place.tolist() == [0, 1, 3]  # the third is too long for this teacher
        assert "label" in plain(way.prompt)
    own = replica._call(replica._task.run(rows[0]))
    np.testing.assert_allclose(said[OWN].logprobs[0], own.class_logprobs, atol=1e-4)
    judged = judge(ways(recipe), said, np.array([0, 1, 2, 2]), Price())
    text = side_by_side(judged)
    assert "direct: labels.classes" in text and "short: 1 rows are not answered" in text
    assert best(judged) is not judged[2]
