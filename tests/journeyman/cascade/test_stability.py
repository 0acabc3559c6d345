"""The spread of scores against that of the certify rows."""

import numpy as np
import pytest

from journeyman.cascade.stability import Stability
from journeyman.certify.curve import cost_quality_curve

# Certified on scores that are spread evenly over 0 to 1.
CURVE = cost_quality_curve(
    np.random.default_rng(0).random(2_000), np.zeros(2_000, bool)
).to_points()


def index(scores: np.ndarray) -> float | None:
    stability = Stability(CURVE, 2_000)
    stability.add(scores)
    return stability.index()


def test_scores_as_they_were_certified_are_stable():
    found = index(np.random.default_rng(1).random(1_000))
    assert found is not None and found < 0.05


def test_the_index_of_other_scores_is_the_textbooks():
    scores = np.random.default_rng(2).beta(2, 5, 1_000)
    observed = np.histogram(scores, np.linspace(0, 1, 11))[0] / 1_000
    with np.errstate(divide="ignore"):
        by_hand = np.sum((observed - 0.1) * np.log(np.maximum(observed, 5e-4) / 0.1))
    assert index(scores) == pytest.approx(by_hand, rel=0.15)
    assert index(scores) > 0.5


def test_only_the_last_thousand_texts_count():
    stability = Stability(CURVE, 2_000)
    stability.add(np.zeros(5_000))
    stability.add(np.random.default_rng(3).random(1_000))
    assert stability.index() < 0.05


def test_too_few_texts_or_no_curve_say_nothing():
    assert index(np.random.default_rng(4).random(99)) is None
    without = Stability((), 2_000)
    without.add(np.zeros(500))
    assert without.index() is None
