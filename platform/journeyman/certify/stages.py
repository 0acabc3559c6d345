"""Cascades of more than two stages: several students in turn, then the teacher.

Owns the path of threshold vectors, which `calibrate` rows fix, and the certificate along it. A
request goes from stage to stage until one is confident enough; the teacher answers the rest.
What a recipe asks of them is ``several``'s.

One promise over the whole system wants no split of delta. System risk at a vector of thresholds is
the chance that a stage before the teacher answers and differs from it; at any fixed vector the
errors are binomial, so BinomCDF(errors; n, alpha) <= delta tests it exactly. Vectors are tested
along a path, ever cheaper, each at delta, up to the first that fails: the promise breaks only if
the first true violator on the path passes. The path must be fixed, and not searched, since the risk
is not monotone in an inner stage's threshold: what that stage no longer answers may be answered
worse by the next. Promises that are separate, one for each stage, do want their share of delta.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

from journeyman.certify.certificate import (
    Certificate,
    allowed_errors,
    certify_system_agreement,
    check_target,
    rows_needed,
)
from journeyman.certify.thresholds import ANSWER_EVERYTHING, ESCALATE_EVERYTHING
from journeyman.errors import DataError
from journeyman.probabilities import FloatArray, IntArray

_VECTORS = 2500  # of the grid that the path is taken from


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagedRows:
    """n rows as s stages before the teacher see them.

    Attributes:
        scores: float64[s, n], each stage's confidence, higher is more confident.
        differs: bool[s, n], its answer is not the teacher's.
    """

    scores: FloatArray
    differs: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape != self.differs.shape:
            raise DataError(
                f"Scores have shape {self.scores.shape}, `differs` {self.differs.shape}; pass one "
                "row of each for every stage before the teacher."
            )

    def answered_by(self, thresholds: npt.ArrayLike) -> IntArray:
        """Index of the stage that answers each row, int64[n]; s is the teacher."""
        confident = self.scores > np.asarray(thresholds)[:, None]
        return np.where(confident.any(axis=0), confident.argmax(axis=0), len(confident))

    def errors(self, answered_by: IntArray) -> int:
        """How many rows get another answer than the teacher's."""
        with_teacher = np.vstack([self.differs, np.zeros(self.differs.shape[1], dtype=np.bool_)])
        return int(with_teacher[answered_by, np.arange(len(answered_by))].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesCertificate:
    """What a cascade of s stages and a teacher promises.

    Attributes:
        alpha: the most that the chance of another answer than the teacher's may be.
        delta: the most that the chance of a broken promise may be.
        n: `certify` rows.
        thresholds: of each stage before the teacher; +inf lets it answer nothing.
        shares: of the `certify` rows, answered by each stage, the teacher last.
        cost: mean of a `certify` row, in the unit of the stages' costs.
        errors: `certify` rows with another answer than the teacher's.
        upper_bound: what the risk is below with confidence 1 - delta, for the vector taken: alpha.
        feasible: whether any stage before the teacher may answer anything.
        reason: if not feasible, why; else empty.
    """

    alpha: float
    delta: float
    n: int
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    cost: float
    errors: int
    upper_bound: float
    feasible: bool
    reason: str


def cost_of_rows(answered_by: IntArray, stage_costs: npt.ArrayLike) -> float:
    """Mean cost: a row pays for the stage that answers and for all before it.

    stage_costs: float[s + 1], of one request to each stage, the teacher last.
    """
    return float(np.cumsum(np.asarray(stage_costs, dtype=np.float64))[answered_by].mean())


def plan_path(calibrate: StagedRows, stage_costs: npt.ArrayLike) -> FloatArray:
    """Threshold vectors to test, float64[k, s], from the most faithful to ever cheaper ones.

    For each number of errors on `calibrate` rows the cheapest vector that makes no more, over a
    grid of quantiles of every stage's scores. The first costs most and errs least.
    """
    n_levels = max(int(_VECTORS ** (1 / len(calibrate.scores))), 2)
    ladders = [_ladder(scores, n_levels) for scores in calibrate.scores]
    vectors = np.array(list(itertools.product(*ladders)))
    routes = [calibrate.answered_by(vector) for vector in vectors]
    errors = np.array([calibrate.errors(route) for route in routes])
    costs = np.array([cost_of_rows(route, stage_costs) for route in routes])
    path: list[int] = []
    for i in np.lexsort((costs, errors)):
        if not path or costs[i] < costs[path[-1]]:
            path.append(int(i))
    return vectors[path]


def certify_stages(
    certify: StagedRows,
    path: FloatArray,
    stage_costs: npt.ArrayLike,
    alpha: float,
    delta: float,
) -> StagesCertificate:
    """Certify P(another answer than the teacher's) <= alpha for the cheapest vector that passes.

    Args:
        certify: rows that nothing was fitted or planned on.
        path: float64[k, s], from `plan_path` on `calibrate` rows.
        stage_costs: float[s + 1], of one request to each stage, the teacher last.
        alpha: target.
        delta: allowed chance of a broken promise.
    """
    check_target(alpha, delta)
    n = certify.scores.shape[1]
    taken = np.full(certify.scores.shape[0], ESCALATE_EVERYTHING)
    if allowed_errors(n, alpha, delta) >= 0:
        for vector in path:
            if bdtr(certify.errors(certify.answered_by(vector)), n, alpha) > delta:
                break
            taken = vector
    answered_by = certify.answered_by(taken)
    shares = np.bincount(answered_by, minlength=len(taken) + 1) / max(n, 1)
    feasible = bool((answered_by < len(taken)).any())
    return StagesCertificate(
        alpha=alpha,
        delta=delta,
        n=n,
        thresholds=tuple(taken.tolist()),
        shares=tuple(shares.tolist()),
        cost=cost_of_rows(answered_by, stage_costs),
        errors=certify.errors(answered_by),
        upper_bound=alpha if feasible else 0.0,
        feasible=feasible,
        reason="" if feasible else _why_nothing_is_answered(n, alpha, delta),
    )


def certify_each_stage(
    certify: StagedRows, alphas: npt.ArrayLike, delta: float
) -> tuple[Certificate, ...]:
    """A separate promise for each stage before the teacher, all together at 1 - delta.

    Stage i's is P(stage i is confident and differs from the teacher) <= alphas[i], certified at
    delta / s over all rows, whether they reach it or not. So it outlives a change of any other
    stage, and the whole system's risk is at most the sum of alphas; `certify_stages` gives a
    cheaper cascade where only that sum matters.
    """
    targets = np.asarray(alphas, dtype=np.float64)
    if targets.shape != (len(certify.scores),):
        raise DataError(
            f"There are {targets.size} targets for {len(certify.scores)} stages before the "
            "teacher; give each its own."
        )
    return tuple(
        certify_system_agreement(scores, differs, float(alpha), delta / len(targets))
        for scores, differs, alpha in zip(certify.scores, certify.differs, targets, strict=True)
    )


def _why_nothing_is_answered(n: int, alpha: float, delta: float) -> str:
    return (
        f"No step of the path passed on {n} certify rows, where at least "
        f"{rows_needed(alpha, delta)} are needed without any error. Everything goes to the "
        "teacher: label more certify rows, or raise the target."
    )


def _ladder(scores: FloatArray, n_levels: int) -> FloatArray:
    """At most so many thresholds, from +inf over quantiles of the scores to -inf."""
    inner = np.linspace(1, 0, n_levels)[1:-1]
    falling = np.unique(np.quantile(scores, inner, method="lower"))[::-1]
    return np.concatenate(([ESCALATE_EVERYTHING], falling, [ANSWER_EVERYTHING]))
