"""How many replicas of the ingress there are: by how busy their students are.

Serve's own policy counts requests under way. On an ingress most of those wait for the teacher,
which more ingresses would not make faster: twelve of them scaled an idle one from 1 to 6.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

BUSY = "student_busy"  # share of the time since the last report in which the student computed


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
