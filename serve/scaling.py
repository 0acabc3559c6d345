"""How many replicas there are: ingresses by how busy their students are, teachers by the load that
there will be when another one could answer.

Serve's own policy counts requests under way. On an ingress most of those wait for the teacher,
which more ingresses would not make faster: twelve of them scaled an idle one from 1 to 6. For a
teacher it is the right count, but one that is late by as long as an engine takes to start.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from ray.serve.config import AutoscalingContext

BUSY = "student_busy"  # share of the time since the last report in which the student computed

_SEEN = "seen"  # of a policy's state: [time in s, load], the oldest first
_SEEN_EVERY_S, _SEEN_FOR_S = 1.0, 30.0
_FEWEST = 10  # points that a trend is read from
_SURE = 2.0  # standard errors that a trend must be above nothing


class Busy:
    """How busy this replica's student is."""

    def __init__(self) -> None:
        self._worked_s, self._since = 0.0, time.monotonic()

    def worked(self, seconds: float) -> None:
        """From any thread."""
        self._worked_s += seconds

    def share(self) -> float:
        """Of the time since the last call."""
        now = time.monotonic()
        share = self._worked_s / max(now - self._since, 1e-9)
        self._worked_s, self._since = 0.0, now
        return min(1.0, share)


class BusyStudents:
    """A policy of Serve's; its bounds, delays and factors are applied by Serve."""

    def __init__(self, wanted: float) -> None:
        """wanted: share of its time that each student is to be busy, in (0, 1]."""
        self._wanted = wanted

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """As many replicas as would be that busy with the same work.

        One that is busy all the time may be asked for more than it can do, which the next
        looks at a grown number of replicas find out.
        """
        reported = (context.aggregated_metrics or {}).get(BUSY, {})
        if not reported:
            return context.target_num_replicas, {}
        return sum(reported.values()) / self._wanted, {}


class RisingLoad:
    """A policy of Serve's that starts a teacher before it is needed, where escalations rise."""

    def __init__(self, ahead_s: float) -> None:
        """ahead_s: how long a teacher takes to start."""
        self._ahead_s = ahead_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """As many as the load wants that there will be, never fewer than it wants now."""
        if not context.current_num_replicas:  # one that starts: Serve wakes it by itself
            return context.target_num_replicas, {}
        now, load = float(context.current_time or 0.0), float(context.total_num_requests)
        seen = [
            point for point in context.policy_state.get(_SEEN, ()) if point[0] > now - _SEEN_FOR_S
        ]
        if not seen or now - seen[-1][0] >= _SEEN_EVERY_S:
            seen = [*seen, (now, load)]
        expected = load + rise(seen, context.config.look_back_period_s) * self._ahead_s
        return expected / context.config.get_target_ongoing_requests(), {_SEEN: seen}


def rise(seen: list[tuple[float, float]], smoothed_s: float) -> float:
    """How fast the load rises for sure, in requests a second: 0 unless it does.

    The slope of least squares less ``_SURE`` standard errors. Loads are means over the last
    ``smoothed_s`` seconds, so that neighbours repeat one another and count as one. seen: (time in
    s, load) pairs.
    """
    if len(seen) < _FEWEST:
        return 0.0
    times, loads = np.asarray(seen, dtype=np.float64).T
    times = times - times.mean()
    spread = float(times @ times)
    if not spread:
        return 0.0
    slope = float(times @ loads) / spread
    residuals = loads - loads.mean() - slope * times
    repeated = max(1.0, smoothed_s * (len(seen) - 1) / float(np.ptp(times)))
    error = (float(residuals @ residuals) / (len(seen) - 2) * repeated / spread) ** 0.5
    return max(0.0, slope - _SURE * error)
