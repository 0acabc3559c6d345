"""Watching the promise on audited requests: tighten or escalate when it breaks, never loosen.

Owns the detector and the ladder of thresholds, and the population stability of scores. Pure: takes
audits, gives the threshold; whoever serves makes the audits and keeps the state.

Each rung of the ladder has a mixture Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo 2023,
E-detectors). As long as the expected loss at a rung is at most alpha, each factor
1 + bet * (loss - alpha) has a mean of at most 1, so M = (M + 1) * factor grows by at most 1 an
audit in the mean, whatever came before. Hence the chance of an alarm within the first n good audits
is at most n / bound, at any n, however often one looks; and unlike a test martingale's, M never
sinks so low in good times that bad ones go unnoticed. All rungs watch the same audits, so that a
tighter threshold is known to be sound, or not, at the moment it is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from journeyman.certify.certificate import GuaranteeKind, check_target
from journeyman.certify.thresholds import ESCALATE_EVERYTHING
from journeyman.errors import DataError, RecipeError
from journeyman.probabilities import FloatArray

# Of an alarm while the promise holds: at most one in so many audits, in the mean.
AUDITS_PER_FALSE_ALARM = 1_000_000
_BETS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """A request that was answered by both, drawn by a coin before anything was decided.

    Attributes:
        score: the student's confidence, as the threshold sees it.
        loss: what the student's answer costs: 1 where it differs from the teacher's; against gold
            1 where only the teacher is right, -1 where only the student is. A lost audit is a 1.
    """

    score: float
    loss: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watch:
    """The state after some audits; `audited` gives the next one.

    Attributes:
        kind: the guarantee watched.
        alpha: its target.
        thresholds: float64[r], from the certified one to ever stricter ones.
        log_detectors: float64[r, b], logarithm of every rung's M, for each size of bet.
        alarmed: bool[r], whether a rung's mean M over the bets has ever reached the bound.
        n_audits: seen so far.
        bound: what M is compared with: audits per false alarm.
    """

    kind: GuaranteeKind
    alpha: float
    thresholds: FloatArray
    log_detectors: FloatArray
    alarmed: npt.NDArray[np.bool_]
    n_audits: int
    bound: float

    @property
    def threshold(self) -> float:
        """The student may answer strictly above it: the loosest without an alarm, +inf if there is
        none. It never falls from one audit to the next."""
        return ESCALATE_EVERYTHING if self.rung is None else float(self.thresholds[self.rung])

    @property
    def rung(self) -> int | None:
        """Index of the rung that stands; None if everything is escalated."""
        standing = np.flatnonzero(~self.alarmed)
        return int(standing[0]) if len(standing) else None

    def audited(self, audit: Audit) -> Watch:
        """The state after one more audit."""
        if not (audit.score < np.inf and -1 <= audit.loss <= 1):
            raise DataError(
                f"An audit has score {audit.score} and loss {audit.loss}; expected a score, "
                "-inf of what the student cannot answer, and a loss of -1, 0 or 1."
            )
        answered = audit.score > self.thresholds
        losses = np.where(answered, audit.loss, 0)
        # What a rung does not answer tells nothing of the share among what it answers.
        counts = answered if self.kind == "selective_agreement" else np.ones_like(answered)
        factors = np.log1p(_bets(self.kind, self.alpha)[None, :] * (losses - self.alpha)[:, None])
        log_detectors = np.where(
            counts[:, None], np.logaddexp(self.log_detectors, 0.0) + factors, self.log_detectors
        )
        level = np.logaddexp.reduce(log_detectors, axis=1) - np.log(_BETS)
        return replace(
            self,
            log_detectors=log_detectors,
            alarmed=self.alarmed | (level >= np.log(self.bound)),
            n_audits=self.n_audits + 1,
        )


def start_watch(
    kind: GuaranteeKind,
    alpha: float,
    thresholds: npt.ArrayLike,
    audits_per_false_alarm: float = AUDITS_PER_FALSE_ALARM,
) -> Watch:
    """Begin, before the first audit.

    Args:
        kind: the served guarantee.
        alpha: its target.
        thresholds: float[r], rising: the certified one, then stricter ones, such as quantiles of
            the certify rows' scores above it.
        audits_per_false_alarm: at any rung whose promise holds, at least so many in the mean.
    """
    check_target(alpha, 0.5)
    rungs = np.asarray(thresholds, dtype=np.float64)
    if rungs.ndim != 1 or not len(rungs) or not (np.diff(rungs) > 0).all():
        raise RecipeError(
            "The ladder's thresholds must rise, from the certified one on; got "
            f"{np.array2string(rungs, threshold=6)}."
        )
    if audits_per_false_alarm <= 1:
        raise RecipeError(
            f"audits_per_false_alarm is {audits_per_false_alarm:g}, expected more than 1."
        )
    return Watch(
        kind=kind,
        alpha=alpha,
        thresholds=rungs,
        log_detectors=np.full((len(rungs), _BETS), -np.inf),
        alarmed=np.zeros(len(rungs), dtype=np.bool_),
        n_audits=0,
        bound=audits_per_false_alarm,
    )


def population_stability(expected: npt.ArrayLike, observed: npt.ArrayLike) -> float:
    """Population stability index of scores: sum of (q - p) * log(q / p) over bins.

    For a dashboard, where above .2 counts as a shift: it moves no threshold. In windows of a
    hundred rows it passes .1 in a third of all cases without any drift.

    Args:
        expected: int[b], certify rows in each bin of scores, such as tenths.
        observed: int[b], recent requests in the same bins. Half a row is added to each bin, so that
            an empty one leaves the index finite.
    """
    p, q = np.asarray(expected, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    if p.shape != q.shape or p.ndim != 1 or len(p) < 2 or not p.sum() or not q.sum():
        raise DataError(
            f"Counts have shapes {p.shape} and {q.shape} and sums {p.sum():g} and {q.sum():g}; "
            "pass as many bins of each, at least two, none without any row."
        )
    p, q = (p + 0.5) / (p + 0.5).sum(), (q + 0.5) / (q + 0.5).sum()
    return float(((q - p) * np.log(q / p)).sum())


def _bets(kind: GuaranteeKind, alpha: float) -> FloatArray:
    """Halving sizes, float64[b], the largest half of what keeps every factor positive."""
    largest = 1 / (1 + alpha) if kind == "accuracy" else 1 / alpha
    return np.asarray(largest * 0.5 ** np.arange(1, _BETS + 1), dtype=np.float64)
