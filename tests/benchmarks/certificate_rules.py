"""The published rules for an escalation threshold that ``certificate.py`` compares, and ours.

Each takes the same labeled rows (a calibrate and a certify part) and a target, and says which rows
of a whole pool the student may answer. Where a paper's rule aims at something else (a budget, a
mean, a selective risk), the docstring says how it is set to the target here. Written after the
papers, and where named after their authors' code; nothing is tuned on the pools.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import bdtr, softmax

from journeyman.certify.accuracy import design_against_gold
from journeyman.certify.certificate import allowed_errors
from journeyman.certify.decisions import ScoredRows, decide
from journeyman.certify.deferral_head import class_features, fit_deferral_head
from journeyman.certify.thresholds import threshold_table
from journeyman.labels.dataset import ClassRows
from journeyman.recipe import Certify

Promise = Literal["system_agreement", "selective_agreement", "accuracy"]
# A probability of nine tenths, as a default that is shipped and never fitted.
_FIXED_LOG_PROBABILITY = np.log(0.9)
_LEAST_ROWS = 30  # of Trust-or-Escalate's strictest threshold


@dataclass(frozen=True, eq=False)
class Pool:
    """All rows of a population: the student's logits, the teacher's log-probabilities, gold."""

    name: str
    logits: np.ndarray  # float32[n, c]
    logprobs: np.ndarray  # float64[n, c]
    gold: np.ndarray  # int64[n]

    @cached_property
    def differs(self) -> np.ndarray:
        return self.logits.argmax(axis=1) != self.logprobs.argmax(axis=1)

    @cached_property
    def losses(self) -> np.ndarray:
        """1 where only the teacher is right, -1 where only the student is, else 0."""
        teacher_right = self.logprobs.argmax(axis=1) == self.gold
        student_right = self.logits.argmax(axis=1) == self.gold
        return teacher_right.astype(np.int64) - student_right

    @cached_property
    def probabilities(self) -> np.ndarray:
        return softmax(self.logits.astype(np.float64), axis=1)

    @cached_property
    def top(self) -> np.ndarray:
        return self.probabilities.max(axis=1)

    def costs(self, promise: Promise) -> np.ndarray:
        return self.losses if promise == "accuracy" else self.differs.astype(np.int64)

    def risk(self, promise: Promise, answered: np.ndarray) -> float:
        """The true risk where the student answers bool[n]; 0 where it answers nothing."""
        costs = self.costs(promise)[answered]
        of = len(costs) if promise == "selective_agreement" else len(answered)
        return float(costs.sum() / of) if len(costs) else 0.0

    def rows(self, index: np.ndarray) -> ScoredRows:
        names = tuple(f"class {i}" for i in range(self.logits.shape[1]))
        rows = ClassRows(
            labels=names,
            ids=[""] * len(index),
            texts=[""] * len(index),
            splits=np.full(len(index), "", dtype=object),
            gold=self.gold[index],
            logprobs=self.logprobs[index],
        )
        return ScoredRows(rows=rows, logits=self.logits[index])


@dataclass(frozen=True, eq=False)
class Draw:
    """What a rule is given: rows of the pool for each purpose, and the target."""

    pool: Pool
    calibrate: np.ndarray  # int64, index into the pool
    certify: np.ndarray
    promise: Promise
    alpha: float
    delta: float

    @property
    def all_rows(self) -> np.ndarray:
        return np.concatenate([self.calibrate, self.certify])


def journeyman(draw: Draw) -> np.ndarray:
    """As the certify step does it: temperature and score on calibrate, threshold on certify."""
    settings = Certify(guarantee=draw.promise, alpha=draw.alpha, delta=draw.delta)
    pool = draw.pool
    confidence, (certificate,), _ = decide(
        settings, pool.rows(draw.calibrate), pool.rows(draw.certify)
    )
    return confidence.of(pool.logits)[1] > certificate.threshold


def naive(draw: Draw) -> np.ndarray:
    """The loosest threshold whose observed risk on certify rows is within the target."""
    return draw.pool.top > _loosest_observed(draw, draw.pool.top, draw.certify)


def routellm(draw: Draw) -> np.ndarray:
    """RouteLLM (Ong et al. 2024): a quantile of the router's score, for a share of strong calls.

    `routellm.calibrate_threshold` takes the share as given; here it is the one that meets the
    target on calibrate rows, and the quantile is of the certify rows.
    """
    threshold = _loosest_observed(draw, draw.pool.top, draw.calibrate)
    escalated = (draw.pool.top[draw.calibrate] <= threshold).mean()
    return draw.pool.top > np.quantile(draw.pool.top[draw.certify], escalated)


def frugalgpt(draw: Draw) -> np.ndarray:
    """FrugalGPT (Chen et al. 2023): a scorer is learned, and the threshold fitted on its rows."""
    rows = draw.all_rows
    costly = draw.pool.costs(draw.promise)[rows] > 0
    head = fit_deferral_head(class_features(draw.pool.probabilities[rows]), costly)
    scores = head.may_answer(class_features(draw.pool.probabilities))
    return scores > _loosest_observed(draw, scores, rows)


def fixed_threshold(draw: Draw) -> np.ndarray:
    """A log-probability that is shipped as a default, whatever the student and the target."""
    return np.log(draw.pool.top) > _FIXED_LOG_PROBABILITY


def conformal_risk_control(draw: Draw) -> np.ndarray:
    """Conformal risk control (Angelopoulos et al. 2024): (sum of losses + 1) / (n + 1) <= alpha.

    It bounds the mean risk over draws. Its losses must be monotone: against gold they are those
    rows that only the teacher gets right; a selective risk is divided by the answered rows.
    """
    costs = np.maximum(draw.pool.costs(draw.promise), 0)
    n = len(draw.certify)

    def within(accepted: np.ndarray, cost: np.ndarray) -> np.ndarray:
        of = accepted if draw.promise == "selective_agreement" else n
        return (cost + 1) / (of + 1) <= draw.alpha

    return draw.pool.top > _loosest(draw.pool.top, costs, draw.certify, within)


def trust_or_escalate(draw: Draw) -> np.ndarray:
    """Trust or Escalate (Jung et al. 2025), after `SelectiveClassificationUtil` of its authors.

    Fixed-sequence testing from the strictest of 5,000 thresholds that keeps 30 rows; where its
    bound fails there, that threshold is taken all the same. It is about the selective risk, which
    bounds the system's too; against gold it counts the rows that only the teacher gets right.
    """
    top = draw.pool.top
    costs = np.maximum(draw.pool.costs(draw.promise), 0)
    rising = draw.certify[np.argsort(top[draw.certify])]
    grid = np.linspace(1, 0, 5000)
    below = np.searchsorted(top[rising], grid, side="left")
    from_top = np.append(np.cumsum(costs[rising][::-1])[::-1], 0)
    accepted, errors = len(rising) - below, from_top[below].astype(float)
    kept = accepted >= _LEAST_ROWS
    grid, accepted, errors = grid[kept], accepted[kept], errors[kept]
    passes = bdtr(errors, accepted, draw.alpha) <= draw.delta
    n_passing = len(passes) if passes.all() else int(np.argmin(passes))
    return top >= grid[max(n_passing - 1, 0)]


def ucci(draw: Draw) -> np.ndarray:
    """UCCI (Kotte 2026), after its authors' `select_threshold`.

    Error probability by isotonic regression on the margin, on calibrate rows; then the cheapest of
    201 thresholds on it whose observed risk on certify rows is within the target.
    """
    ranked = np.sort(draw.pool.probabilities, axis=1)
    doubt = 1 - (ranked[:, -1] - ranked[:, -2])
    order = np.argsort(doubt[draw.calibrate], kind="stable")
    rows = draw.calibrate[order]
    fitted = isotonic_regression((draw.pool.costs(draw.promise)[rows] > 0).astype(float)).x
    error = np.interp(doubt, doubt[rows], fitted)
    answers = error[draw.certify][None, :] <= np.linspace(0, 1, 201)[:, None]
    costs = answers @ draw.pool.costs(draw.promise)[draw.certify]
    of = len(draw.certify)
    of = np.maximum(answers.sum(axis=1), 1) if draw.promise == "selective_agreement" else of
    within = np.flatnonzero(costs / of <= draw.alpha)
    return error <= within[-1] / 200 if len(within) else np.zeros(len(error), dtype=bool)


def c3po(draw: Draw) -> np.ndarray:
    """C3PO (Valkanas et al. 2025): the least regret to the teacher within a bound on cost.

    A conformal bound on certify rows says that a request is escalated with at most the chance that
    the budget allows; the strictest such threshold has the least regret. The budget is a user's;
    here it is the share of escalations that meets the target on calibrate rows.
    """
    threshold = _loosest_observed(draw, draw.pool.top, draw.calibrate)
    budget = (draw.pool.top[draw.calibrate] <= threshold).mean()
    n = len(draw.certify)
    n_escalated = int(np.floor(budget * (n + 1))) - 1
    ranked = np.sort(draw.pool.top[draw.certify])
    return draw.pool.top > (ranked[n_escalated - 1] if n_escalated > 0 else -np.inf)


def oracle(draw: Draw) -> np.ndarray:
    """The loosest threshold on the most probable class within the target, knowing the pool."""
    everything = np.arange(len(draw.pool.top))
    return draw.pool.top > _loosest_observed(draw, draw.pool.top, everything)


def _loosest_observed(draw: Draw, scores: np.ndarray, rows: np.ndarray) -> float:
    n = len(rows)

    def within(accepted: np.ndarray, cost: np.ndarray) -> np.ndarray:
        of = np.maximum(accepted, 1) if draw.promise == "selective_agreement" else n
        return cost / of <= draw.alpha

    return _loosest(scores, draw.pool.costs(draw.promise), rows, within)


def _loosest(
    scores: np.ndarray,
    costs: np.ndarray,
    rows: np.ndarray,
    within: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> float:
    """The loosest threshold on these rows for which `within(accepted, cost)`; +inf if none."""
    table = threshold_table(scores[rows], costs[rows] > 0)
    passing = np.flatnonzero(within(table.n_accepted, table.accepted_sum(costs[rows])))
    return float(table.threshold[passing[-1]]) if len(passing) else np.inf


def losses_alone(draw: Draw) -> np.ndarray:
    """Clopper-Pearson on the rows that only the teacher gets right, which are monotone."""
    costs = np.maximum(draw.pool.costs(draw.promise), 0)
    most = allowed_errors(len(draw.certify), draw.alpha, draw.delta)
    threshold = _loosest(draw.pool.top, costs, draw.certify, lambda _, cost: cost <= most)
    return draw.pool.top > threshold


def betting(draw: Draw) -> np.ndarray:
    """A betting test (Waudby-Smith and Ramdas 2024) of the drop, along Journeyman's sequence."""
    top, losses, alpha = draw.pool.top, draw.pool.losses, draw.alpha
    design = design_against_gold(
        top[draw.calibrate], losses[draw.calibrate], len(draw.certify), alpha, draw.delta
    )
    chosen = np.inf
    for threshold in design.thresholds:
        of_row = losses[draw.certify] * (top[draw.certify] > threshold)
        seen = np.arange(1, len(of_row) + 1)
        mean = (np.cumsum(of_row) - of_row) / seen
        spread = (np.cumsum(of_row**2) - of_row**2 + 0.25) / seen - mean**2
        lead = alpha - mean
        bets = np.clip(lead / (spread + lead**2), 0, 0.75 / (1 - alpha))
        if np.cumsum(np.log1p(bets * (alpha - of_row))).max() < np.log(1 / draw.delta):
            break
        chosen = threshold
    return top > chosen


RULES: dict[str, Callable[[Draw], np.ndarray]] = {
    "journeyman": journeyman,
    "naive": naive,
    "RouteLLM": routellm,
    "FrugalGPT": frugalgpt,
    "fixed log-probability": fixed_threshold,
    "conformal risk control": conformal_risk_control,
    "Trust or Escalate": trust_or_escalate,
    "UCCI": ucci,
    "C3PO": c3po,
}
AGAINST_GOLD = {"losses alone": losses_alone, "betting test": betting}
