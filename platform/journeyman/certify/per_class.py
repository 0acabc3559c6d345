"""A promise and a threshold for each answer that the student gives.

Each class's promise is certified at delta / c on the rows that the student answers with it, so by
the union bound all hold together with confidence 1 - delta; hence for traffic with any mixture of
those answers, as long as each answer's own requests stay as they were. One promise over all of them
wants no such split: that is the plain certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from journeyman.certify.certificate import Certificate, GuaranteeKind
from journeyman.certify.guarantees import ScoredOutcomes, certify_kind
from journeyman.certify.thresholds import ESCALATE_EVERYTHING, subtractable
from journeyman.probabilities import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCertificates:
    """One certificate for each of c classes, and what they say together.

    Attributes:
        each: by class, at delta / c.
        together: at delta, with threshold 0 of the score less its class's threshold.
    """

    each: tuple[Certificate, ...]
    together: Certificate

    @property
    def thresholds(self) -> FloatArray:
        """float64[c], finite: see `confidence.Confidence`."""
        return np.array([subtractable(c.threshold) for c in self.each])


def certify_each_class(
    kind: GuaranteeKind,
    calibrate: tuple[IntArray, ScoredOutcomes],
    certify: tuple[IntArray, ScoredOutcomes],
    n_classes: int,
    alpha: float,
    delta: float,
) -> ClassCertificates:
    """Certify system or selective agreement within the rows of each answer.

    Args:
        kind: which; its risk is a share of the rows with that answer.
        calibrate, certify: the student's answers, int64[n], and their rows.
        n_classes: c.
        alpha: target for every class.
        delta: allowed chance that any of the promises is broken.
    """
    each = tuple(
        certify_kind(
            kind,
            calibrate[1].take(calibrate[0] == answer),
            certify[1].take(certify[0] == answer),
            alpha,
            delta / n_classes,
        )
        for answer in range(n_classes)
    )
    return ClassCertificates(each=each, together=_together(each, alpha, delta))


def _together(each: tuple[Certificate, ...], alpha: float, delta: float) -> Certificate:
    feasible = any(c.feasible for c in each)
    reason = f"For no answer of the student a threshold was found. The first: {each[0].reason}"
    return Certificate(
        kind=each[0].kind,
        alpha=alpha,
        delta=delta,
        n=sum(c.n for c in each),
        threshold=0.0 if feasible else ESCALATE_EVERYTHING,
        n_accepted=sum(c.n_accepted for c in each),
        errors=sum(c.errors for c in each),
        # Any mixture of the answers is at most as bad as the worst of them.
        upper_bound=max(c.upper_bound for c in each),
        k_star=sum(max(c.k_star, 0) for c in each),
        feasible=feasible,
        reason="" if feasible else reason,
    )
