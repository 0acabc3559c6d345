"""Confidence of students that write: from their tokens' log-probabilities, or from more samples.

Pure functions of a row's own tokens or samples. What a threshold on them promises is the same as
for classes, given what "differs" means for two texts; certifying takes scores and differences and
does not ask where they come from.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from journeyman.certify.deferral_head import DeferralHead
from journeyman.errors import DataError, RecipeError
from journeyman.probabilities import FloatArray
from journeyman.recipe.serving import MOST_SAMPLES

WrittenScore = Literal[
    "mean_logprob", "least_logprob", "token_quantile", "deferral_head", "self_consistency",
    "sampled_head",
]  # fmt: skip
# Those that take nothing but the answer's own tokens, and are not learned.
FIXED: tuple[WrittenScore, ...] = ("mean_logprob", "least_logprob", "token_quantile")
LEARNED: tuple[WrittenScore, ...] = ("deferral_head", "sampled_head")
SAMPLED: tuple[WrittenScore, ...] = ("self_consistency", "sampled_head")
# Less than the step between two shares of MOST_SAMPLES samples and an answer.
_TIE_BREAK = 1 / (4 * MOST_SAMPLES)
QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def token_features(
    logprobs: npt.ArrayLike,
    lengths: npt.ArrayLike,
    quantiles: Sequence[float] = QUANTILES,
) -> FloatArray:
    """Quantiles of each answer's token log-probabilities, and its length: float64[n, q + 1].

    A mean hides the one token that was a guess, and a sum punishes long answers (Gupta et al. 2024,
    Language Model Cascades: Token-level uncertainty and beyond). A `DeferralHead` on these features
    is their learned deferral rule.

    Args:
        logprobs: float[t], of the sampled tokens of all answers, one answer after the other.
        lengths: int[n], tokens of each answer, at least one; they sum to t.
        quantiles: from 0, the least sure token, to 1; between two tokens linear, as numpy's.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    of_row = np.asarray(lengths, dtype=np.int64)
    if values.ndim != 1 or of_row.sum() != len(values) or (of_row < 1).any():
        raise DataError(
            f"There are {len(values)} token log-probabilities for lengths that sum to "
            f"{of_row.sum()}, the shortest {of_row.min(initial=0)}; pass those of every token of "
            "every answer, at least one for each."
        )
    row_of_token = np.repeat(np.arange(len(of_row)), of_row)
    ranked = values[np.lexsort((values, row_of_token))]
    first = np.concatenate(([0], np.cumsum(of_row)[:-1])).astype(np.int64)
    place = np.asarray(quantiles)[None, :] * (of_row[:, None] - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, of_row[:, None] - 1)
    share = place - below
    low, high = ranked[first[:, None] + below], ranked[first[:, None] + above]
    return np.hstack([low + share * (high - low), np.log(of_row)[:, None]])


def token_quantile(
    logprobs: npt.ArrayLike, lengths: npt.ArrayLike, quantile: float = 0.1
) -> FloatArray:
    """One quantile of each answer's token log-probabilities: float64[n], without any fitting."""
    return np.ascontiguousarray(token_features(logprobs, lengths, (quantile,))[:, 0])


def self_consistency(answers: Sequence[Sequence[Hashable]]) -> FloatArray:
    """Share of a row's samples whose answer is that of its first: float64[n].

    The first is the one that would be given (greedy, or the majority's, by whoever calls); parse
    answers before, so that equal ones are equal (Wang et al. 2023, Self-Consistency). Ties are
    many, with k samples there are k values: `WrittenConfidence` breaks them by a second score.
    """
    if any(len(samples) < 2 for samples in answers):
        raise DataError("Self-consistency takes at least two samples of every row.")
    return np.array([sum(s == samples[0] for s in samples) / len(samples) for samples in answers])


def answer_features(
    logprobs: npt.ArrayLike, lengths: npt.ArrayLike, agreements: npt.ArrayLike | None = None
) -> FloatArray:
    """What a head learns from: `token_features`, and with samples their agreement behind them."""
    of_tokens = token_features(logprobs, lengths)
    if agreements is None:
        return of_tokens
    return np.hstack([of_tokens, np.asarray(agreements, dtype=np.float64)[:, None]])


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenConfidence:
    """How sure a student is of an answer that it wrote.

    Attributes:
        score: mean, least or 0.1-quantile of its tokens' log-probabilities; how many of its samples
            say the same, ties broken by that mean; or what was learned of `answer_features`,
            without the samples (deferral_head) or with them (sampled_head).
        head: that, if it is the score.
    """

    score: WrittenScore
    head: DeferralHead | None = None

    def of(
        self,
        logprobs: npt.ArrayLike,
        lengths: npt.ArrayLike,
        agreements: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """Confidence, float64[n]; logprobs and lengths as in `token_features`, as a label dataset
        gives them back: whoever scores an answer that was not stored rounds it by the same codec.

        agreements: float64[n], as `self_consistency` has them, of scores that are `SAMPLED`.
        """
        stored = np.asarray(logprobs, dtype=np.float64)
        if self.score in SAMPLED and agreements is None:
            raise RecipeError(f"The score {self.score} needs samples of the student: draw them.")
        if self.score == "least_logprob":
            return token_quantile(stored, lengths, 0.0)
        if self.score == "token_quantile":
            return token_quantile(stored, lengths)
        if self.score in LEARNED:
            if self.head is None:
                raise RecipeError(f"The score {self.score} needs a fitted head: certify again.")
            sampled = agreements if self.score in SAMPLED else None
            return self.head.may_answer(answer_features(stored, lengths, sampled))
        means = _means(stored, lengths)
        if self.score == "mean_logprob":
            return means
        # In (0, 1], and of each row alone to the last bit.
        return np.asarray(agreements, dtype=np.float64) + _TIE_BREAK / (1 - means)


def _means(stored: FloatArray, lengths: npt.ArrayLike) -> FloatArray:
    """Of each answer's log-probabilities: float64[n]."""
    features = token_features(stored, lengths)  # which checks them
    of_row = np.asarray(lengths, dtype=np.int64)
    first = np.concatenate(([0], np.cumsum(of_row)[:-1])).astype(np.int64)
    return np.add.reduceat(stored, first) / of_row if len(features) else np.empty(0)
