"""Confidence scores: class probabilities in, one number a row out, higher means more confident.

A score is a pure function of its own row, so serving repeats for one request, bit for bit, what
certification computed for a whole split. Thresholds and guarantees are built elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from journeyman.errors import RecipeError
from journeyman.probabilities import FloatArray, class_probabilities

ScoreName = Literal["max_probability", "margin", "entropy", "deferral_head"]

# A float64 holds 53 bits. Main scores lie within +-16 (4 bits; the entropy of eight million
# classes, the most that `probabilities` takes), rounded to 2**-24, the last bit of a float32
# probability near 1; the remaining 25 bits hold the second score. So the sum of the two is exact,
# and ordered by (main, second).
_MAIN_GRID = 2.0**24
_SECOND_GRID = 2.0**25
# -log of an entropy lies between -log(16) > -4 and -log(2**-1074) < 746.
_SECOND_OFFSET, _SECOND_SPAN = 4.0, 750.0


def max_probability(probabilities: npt.ArrayLike) -> FloatArray:
    """The probability of the most probable class, on a grid of 2**-24: float64[n]."""
    return _on_grid(class_probabilities(probabilities).max(axis=1))


def margin(probabilities: npt.ArrayLike) -> FloatArray:
    """The most probable class's lead over the next one, on a grid of 2**-24: float64[n]."""
    top_two = np.partition(class_probabilities(probabilities), -2, axis=1)[:, -2:]
    return _on_grid(top_two[:, 1] - top_two[:, 0])


def entropy(probabilities: npt.ArrayLike) -> FloatArray:
    """Minus the Shannon entropy in nats, on a grid of 2**-24: float64[n]."""
    return _on_grid(-shannon_entropy(class_probabilities(probabilities)))


# Those that take nothing but the row; the deferral head is learned (`deferral_head`).
SCORES: Mapping[ScoreName, Callable[[npt.ArrayLike], FloatArray]] = MappingProxyType(
    {"max_probability": max_probability, "margin": margin, "entropy": entropy}
)


def score(probabilities: npt.ArrayLike, name: ScoreName) -> FloatArray:
    """Score rows by `name`, one of SCORES, ties broken by the entropy: see `refined`."""
    if name not in SCORES:
        raise RecipeError(
            f"Unknown confidence score {name!r} in certify.scores. Use one of {', '.join(SCORES)}."
        )
    checked = class_probabilities(probabilities)
    return refined(SCORES[name](checked), checked)


def refined(main: npt.ArrayLike, probabilities: npt.ArrayLike) -> FloatArray:
    """main[n], ties broken by the logarithm of the entropy: float64[n].

    The value is the main score, which lies on a grid of 2**-24 between -16 and 16, plus less than
    one step of that grid for the second score. Hence:

    - it depends on its row alone, so one request is scored as in the split it was certified on;
    - it is strictly monotone in the main score: greater there means greater here;
    - equal main scores are ordered by the second score, lower entropy first. The logarithm keeps
      rows apart that a confident student rounds to 1.0 in every main score: their entropies run
      down to 1e-300.

    Rows that tie in both (the same text twice, as a rule) stay tied; the certificates are valid
    with ties and accept or escalate such rows together.
    """
    checked = class_probabilities(probabilities)
    on_grid = _on_grid(np.asarray(main, dtype=np.float64))
    return np.asarray(on_grid + _second_score(checked) / _MAIN_GRID)


def _second_score(probabilities: FloatArray) -> FloatArray:
    """-log(entropy) mapped onto [0, 1), on a grid of 2**-25: float64[n]."""
    least = np.finfo(np.float64).smallest_subnormal
    log_entropy = np.log(np.maximum(shannon_entropy(probabilities), least))
    unit = (_SECOND_OFFSET - log_entropy) / _SECOND_SPAN
    steps = np.clip(np.floor(unit * _SECOND_GRID), 0, _SECOND_GRID - 1)
    return np.asarray(steps / _SECOND_GRID, dtype=np.float64)


def shannon_entropy(probabilities: FloatArray) -> FloatArray:
    """In nats, of probabilities[n, c] as `class_probabilities` gives them: float64[n]."""
    positive = np.where(probabilities > 0, probabilities, 1.0)
    # A float32 softmax may give a little more than 1, whose term is negative; no entropy is.
    terms: FloatArray = -positive * np.log(positive)
    return np.asarray(np.maximum(terms.sum(axis=1), 0.0))


def _on_grid(main: FloatArray) -> FloatArray:
    return np.asarray(np.round(main * _MAIN_GRID) / _MAIN_GRID, dtype=np.float64)
