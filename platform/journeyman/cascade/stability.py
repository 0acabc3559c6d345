"""Whether the student's confidence is spread as it was when the bundle was certified.

For people to look at: without any drift it moves, and it moves no threshold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from journeyman.cascade.drift import population_stability
from journeyman.certify.curve import CurvePoint

_BINS = 10
_WINDOW = 1_000  # texts
_ENOUGH = 100


class Stability:
    """Population stability of the last thousand texts' scores against the certify rows'."""

    def __init__(self, curve: Sequence[CurvePoint], n: int) -> None:
        """curve: of the n certify rows; bins hold about a tenth of them each."""
        points = [(p.coverage, p.threshold) for p in curve if p.threshold is not None]
        edges: dict[float, float] = {}  # threshold to the share of rows above it
        for share in np.linspace(0, 1, _BINS + 1)[1:-1]:
            if points:
                coverage, threshold = min(points, key=lambda point: abs(point[0] - share))
                if 0 < coverage < 1:
                    edges[threshold] = coverage
        self._edges = np.array(sorted(edges))
        above = np.array([1.0, *(edges[edge] for edge in self._edges), 0.0])
        self._expected = -np.diff(above) * n
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def add(self, scores: Iterable[float]) -> None:
        self._recent.extend(scores)

    def index(self) -> float | None:
        """None before a hundred texts, and where there is no curve."""
        if len(self._recent) < _ENOUGH or not len(self._edges):
            return None
        # A row is above a threshold strictly, so a score that equals an edge lies below it.
        bins = np.searchsorted(self._edges, np.fromiter(self._recent, np.float64), side="left")
        observed = np.bincount(bins, minlength=len(self._expected))
        return population_stability(self._expected, observed)
