"""A cascade of several students as a recipe asks for it: one promise over the whole, or each its
own. The rules, and why they hold, are those of ``stages``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from journeyman.certify.asked import AskedStudent
from journeyman.certify.certificate import Certificate, allowed_errors
from journeyman.certify.chain import Chain
from journeyman.certify.confidence import Confidence
from journeyman.certify.guarantees import ScoredOutcomes
from journeyman.certify.parts import Guarantee, Stage, Stages
from journeyman.certify.stages import (
    StagedRows,
    certify_each_stage,
    certify_stages,
    cost_of_rows,
    plan_path,
)
from journeyman.certify.thresholds import ESCALATE_EVERYTHING, subtractable
from journeyman.errors import DataError
from journeyman.probabilities import IntArray
from journeyman.recipe import Certify


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OneOfSeveral:
    """A student on all calibrate and all certify rows, whether they would come to it or not."""

    confidence: Confidence
    calibrate: ScoredOutcomes
    certify: ScoredOutcomes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Several:
    """What s students before a teacher are certified to.

    Attributes:
        chain: the students, each with its threshold.
        certificate: of all of them together; its threshold is that of the chain.
        thresholds: of each student.
        promises: its own of each student; None where there is but the one over the whole.
        answered_by: int64[n], the student that answers each certify row; s is the teacher.
        costs: s + 1 of them, of one request to each student and to the teacher.
        given: the recipe says what they are; else they are seconds.
    """

    chain: Chain
    certificate: Certificate
    thresholds: tuple[float, ...]
    promises: tuple[Certificate, ...] | None
    answered_by: IntArray
    costs: tuple[float, ...]
    given: bool

    @property
    def expected_cost(self) -> float:
        """Mean of a certify row, whoever answers it."""
        return cost_of_rows(self.answered_by, self.costs)

    def written(self, students: Sequence[AskedStudent], differs: npt.NDArray[np.bool_]) -> Stages:
        """For a bundle; differs: bool[n], of certify rows, as their students answer them."""
        own = [Guarantee.from_certificate(promise) for promise in self.promises or ()]
        return Stages(
            students=tuple(
                Stage(
                    student=one.model.reference,
                    student_digest=one.model.weights_digest,
                    student_tokenizer_digest=one.model.tokenizer_digest,
                    text=one.reads.text,
                    text_pair=one.reads.text_pair,
                    score=confidence.score,
                    deferral_head=confidence.head,
                    temperature=confidence.calibrator.temperature,
                    threshold=self.thresholds[i],
                    n_accepted=int((self.answered_by == i).sum()),
                    errors=int(differs[self.answered_by == i].sum()),
                    cost=self.costs[i],
                    guarantee=own[i] if own else None,
                )
                for i, (one, confidence) in enumerate(
                    zip(students, self.chain.confidences, strict=True)
                )
            ),
            teacher_cost=self.costs[-1],
            cost_unit="given" if self.given else "seconds",
            expected_cost=self.expected_cost,
        )

    def in_words(self) -> str:
        """A sentence for the bundle's recommendation."""
        shares = np.bincount(self.answered_by, minlength=len(self.costs)) / len(self.answered_by)
        each = ", ".join(f"number {i + 1} {share:.1%}" for i, share in enumerate(shares[:-1]))
        cost, alone = (
            f"{value:.3g}" if self.given else f"{value:.3g} s"
            for value in (self.expected_cost, self.costs[-1])
        )
        idle = [i + 1 for i, share in enumerate(shares[:-1]) if not share]
        return (
            f" The student is {len(self.thresholds)} here, asked in turn: of the certify rows "
            f"{each} and the teacher {shares[-1]:.1%} are answered, at {cost} a request in the "
            f"mean; the teacher alone takes {alone}."
        ) + (f" Leave number {idle[0]} out: it answers nothing." if idle else "")


def certify_several(
    settings: Certify, students: Sequence[OneOfSeveral], measured: Sequence[float]
) -> Several:
    """Fix the thresholds on calibrate rows, and certify them.

    measured: seconds a row of each student and of the teacher, s + 1 of them; counts where the
    recipe has no ``stage_costs``, and is refused (DataError) where no cascade could pay.
    """
    costs = settings.stage_costs or _in_seconds(measured)
    calibrate = _staged([one.calibrate for one in students])
    rows = _staged([one.certify for one in students])
    alpha, delta, s = settings.alpha, settings.delta, len(students)
    promises = None
    if settings.each_stage:
        promises = certify_each_stage(rows, [alpha / s] * s, delta)
        thresholds = tuple(promise.threshold for promise in promises)
        bound, reason = sum(p.upper_bound for p in promises), promises[0].reason
    else:
        found = certify_stages(rows, plan_path(calibrate, costs), costs, alpha, delta)
        thresholds, bound, reason = found.thresholds, found.upper_bound, found.reason
    answered_by = rows.answered_by(thresholds)
    n, n_accepted = len(answered_by), int((answered_by < s).sum())
    feasible = n_accepted > 0
    return Several(
        chain=_chain(students, thresholds),
        certificate=Certificate(
            kind="system_agreement",
            alpha=alpha,
            delta=delta,
            n=n,
            threshold=0.0 if feasible else ESCALATE_EVERYTHING,
            n_accepted=n_accepted,
            errors=rows.errors(answered_by),
            upper_bound=bound if feasible else 0.0,
            k_star=allowed_errors(n, alpha, delta),
            feasible=feasible,
            reason="" if feasible else reason or "No student is sure enough of any certify row.",
        ),
        thresholds=thresholds,
        promises=promises,
        answered_by=answered_by,
        costs=costs,
        given=settings.stage_costs is not None,
    )


def _in_seconds(measured: Sequence[float]) -> tuple[float, ...]:
    """To two digits: the rest is what else the machine was doing."""
    costs = tuple(float(f"{seconds:.1e}") for seconds in measured)
    if costs[-1] <= sum(costs[:-1]):
        said = ", ".join(f"{cost:g}" for cost in costs[:-1])
        raise DataError(
            f"As measured, a row takes the students {said} s and the teacher {costs[-1]:g} s (its "
            "labels may be from a cache, or from another machine), so that no student would be "
            "worth asking; say what a request to each of them costs in certify.stage_costs."
        )
    return costs


def _staged(students: Sequence[ScoredOutcomes]) -> StagedRows:
    return StagedRows(
        scores=np.stack([one.scores for one in students]),
        differs=np.stack([one.outcomes.differs for one in students]),
    )


def _chain(students: Sequence[OneOfSeveral], thresholds: Sequence[float]) -> Chain:
    return Chain(
        confidences=tuple(
            replace(one.confidence, threshold=subtractable(own))
            for one, own in zip(students, thresholds, strict=True)
        )
    )
