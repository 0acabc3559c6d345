"""How a labeling run stands: what replicas report, summed up, as a live view and Ray metrics."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from journeyman.labels.cost import dollars
from journeyman.labels.replica import Counts
from journeyman.progress import duration
from journeyman.recipe import Price

_RATE_WINDOW_S = 30.0
# A replica that has not reported for so long; and one that has said no more than that it starts.
_GONE_AFTER_S, _NOT_STARTED_AFTER_S = 15.0, 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelProgress:
    """Where a labeling run stands; rates are those of the last half minute."""

    rows: int
    rows_done: int
    rows_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    replicas: int
    shards_waiting: int
    quarantined: int
    filtered: int
    copied: int
    engine_restarts: int
    dollars: float
    eta_s: float | None
    waiting_for: str = ""  # what the cluster has too little of

    def text(self) -> str:
        """Three lines for a person: how far, how fast, and what else is to be known."""
        done = f"label     {self.rows_done:,} of {self.rows:,} rows"
        if self.rows:
            done += f" ({self.rows_done / self.rows:.0%})"
        if self.eta_s is not None:
            done += f", {duration(self.eta_s)} left"
        elif not self.rows_done:
            done += ", the teacher is starting" if self.replicas else ", waiting for a node"
            if self.waiting_for:
                done += f" (a replica takes {self.waiting_for})"
        if self.dollars:
            done += f", ${self.dollars:,.2f}"
        fast = (
            f"{self.rows_per_s:,.1f} rows/s, {self.prompt_tokens_per_s:,.0f} tokens/s in, "
            f"{self.output_tokens_per_s:,.0f} out"
        )
        rest = (
            f"{_counted(self.replicas, 'replica')}, {_counted(self.shards_waiting, 'shard')} left, "
            f"{self.quarantined:,} in quarantine"
        )
        for n, name in (
            (self.filtered, "skipped"),
            (self.copied, "from the cache"),
            (self.engine_restarts, "engine restarts"),
        ):
            rest += f", {n:,} {name}" if n else ""
        return f"{done}\n          {fast}\n          {rest}"


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


class Tally:
    """An actor: sums what replicas report, and exports the sums as Ray metrics."""

    def __init__(self, run: str) -> None:
        self._total = Counts()
        self._gone_at: dict[str, float] = {}  # when a replica is, unless it reports again
        self._metrics = _Metrics(run)

    def add(self, replica: str, more: Counts) -> None:
        self._total = added(self._total, more)
        patience = _GONE_AFTER_S if replica in self._gone_at else _NOT_STARTED_AFTER_S
        self._gone_at[replica] = time.monotonic() + patience
        self._metrics.add(more)

    def total(self) -> tuple[Counts, int]:
        """Sums so far, and replicas that report."""
        now = time.monotonic()
        alive = sum(now < at for at in self._gone_at.values())
        return self._total, alive

    def show(self, progress: LabelProgress) -> None:
        self._metrics.show(progress)


class _Metrics:
    """The live view's figures under the names that Prometheus reads."""

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        self._tags = {"run": run}
        self._counters = {
            field.name: metrics.Counter(
                f"journeyman_label_{field.name}", f"Labeling: {field.name}.", tag_keys=("run",)
            )
            for field in dataclasses.fields(Counts)
        }
        self._gauges = {
            name: metrics.Gauge(f"journeyman_label_{name}", f"Labeling: {name}.",
                                tag_keys=("run",))
            for name in ("rows_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "replicas",
                         "shards_waiting", "dollars", "eta_s")
        }  # fmt: skip

    def add(self, more: Counts) -> None:
        for name, counter in self._counters.items():
            if value := getattr(more, name):
                counter.inc(value, tags=self._tags)

    def show(self, progress: LabelProgress) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(progress, name) or 0.0, tags=self._tags)


class Meter:
    """Turns sums into progress."""

    def __init__(self, rows: int, rows_before: int, price: Price) -> None:
        self._rows, self._before, self._price = rows, rows_before, price
        self._seen: deque[tuple[float, Counts]] = deque()

    def read(
        self, counts: Counts, replicas: int, shards_waiting: int, waiting_for: str = ""
    ) -> LabelProgress:
        now = time.monotonic()
        if counts.rows:  # engines have started
            self._seen.append((now, counts))
        while self._seen and now - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        then, at_then = self._seen[0] if self._seen else (now, Counts())
        elapsed = max(now - then, 1.0)

        def rate(name: str) -> float:
            return (getattr(counts, name) - getattr(at_then, name)) / elapsed

        left = self._rows - self._before - counts.rows
        return LabelProgress(
            rows=self._rows,
            rows_done=self._before + counts.rows,
            rows_per_s=rate("rows"),
            prompt_tokens_per_s=rate("prompt_tokens"),
            output_tokens_per_s=rate("output_tokens"),
            replicas=replicas,
            shards_waiting=shards_waiting,
            quarantined=counts.quarantined,
            filtered=counts.filtered,
            copied=counts.copied,
            engine_restarts=counts.engine_restarts,
            dollars=dollars(self._price, counts),
            eta_s=max(0, left) / rate("rows") if rate("rows") else None,
            waiting_for=waiting_for,
        )


def added(one: Counts, other: Counts) -> Counts:
    sums: dict[str, Any] = {
        f.name: getattr(one, f.name) + getattr(other, f.name) for f in dataclasses.fields(Counts)
    }
    return Counts(**sums)
