"""What labeling takes: tokens, replica time and dollars, of a run that is done or to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from journeyman.labels.replica import Counts, Trial
from journeyman.progress import duration
from journeyman.recipe import Price

_Z = 1.96  # of a 95% interval


def dollars(price: Price, counts: Counts) -> float:
    """Cost of these tokens and this replica time."""
    cached_price = price.per_million_cached_tokens
    if cached_price is None:
        cached_price = price.per_million_prompt_tokens
    return (
        counts.replica_seconds / 3600 * price.per_replica_hour
        + (counts.prompt_tokens - counts.cached_tokens) / 1e6 * price.per_million_prompt_tokens
        + counts.cached_tokens / 1e6 * cached_price
        + counts.output_tokens / 1e6 * price.per_million_output_tokens
    )


def facts(price: Price, totals: dict[str, Any]) -> dict[str, Any]:
    """The manifest's ``cost``; dollars is None where the recipe names no price."""
    counts = Counts(
        rows=totals["rows"],
        prompt_tokens=totals["prompt_tokens"],
        cached_tokens=totals["cached_tokens"],
        output_tokens=totals["output_tokens"],
        replica_seconds=totals["replica_seconds"],
    )
    priced = any(value for value in price.model_dump().values())
    return {
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "output_tokens": counts.output_tokens,
        "replica_seconds": round(counts.replica_seconds, 3),
        "dollars": round(dollars(price, counts), 6) if priced else None,
        "price": price.model_dump(),
    }


def seconds_a_row(totals: dict[str, Any]) -> float:
    """Of a replica, for a row that it labeled: those from a cache took it none. 0 if none did."""
    asked = totals["ok"] - totals.get("copied", 0)
    return float(totals["replica_seconds"] / asked) if asked > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take, from a sample of its rows. (low, high) are 95% intervals of the mean
    over rows; time and replica hours are as fast as the sample was, engine start included."""

    rows: int
    sampled: int
    quarantined: int  # of the sample
    prompt_tokens: tuple[float, float]
    output_tokens: tuple[float, float]
    replica_hours: float
    replicas: int
    bytes: float
    dollars: tuple[float, float] | None

    def text(self) -> str:
        hours = self.replica_hours / self.replicas
        cost = f"{_span(self.dollars, '$')}" if self.dollars else "no price in teacher.price"
        lines = [
            ("rows", f"{self.rows:,} to label; {self.sampled} tried, "
                     f"{self.quarantined} of them would go to quarantine"),
            ("tokens in", _span(self.prompt_tokens)),
            ("tokens out", _span(self.output_tokens)),
            ("replica hours", f"{self.replica_hours:,.2f}; about {duration(hours * 3600)} with "
                              f"{self.replicas} of them at a time"),
            ("on disk", f"{self.bytes / 1e6:,.1f} MB"),
            ("dollars", cost),
        ]  # fmt: skip
        return "\n".join(f"{name:<14} {value}" for name, value in lines)


def estimate(trials: Sequence[Trial], rows: int, replicas: int, price: Price) -> Estimate:
    """Scale what some rows took to all rows."""
    counts = [c for trial in trials for c in trial.rows]
    scale = rows / len(counts)
    seconds = sum(trial.seconds for trial in trials) * scale + replicas * trials[0].start_seconds
    prompt = _interval([c.prompt_tokens for c in counts], rows)
    output = _interval([c.output_tokens for c in counts], rows)
    cached = sum(c.cached_tokens for c in counts) * scale
    low, high = (
        dollars(price, Counts(prompt_tokens=int(p), cached_tokens=int(min(p, cached)),
                              output_tokens=int(o), replica_seconds=seconds))
        for p, o in zip(prompt, output, strict=True)
    )  # fmt: skip
    return Estimate(
        rows=rows,
        sampled=len(counts),
        quarantined=sum(c.quarantined for c in counts),
        prompt_tokens=prompt,
        output_tokens=output,
        replica_hours=seconds / 3600,
        replicas=replicas,
        bytes=sum(trial.bytes for trial in trials) * scale,
        dollars=(low, high) if high else None,
    )


def _interval(values: Sequence[int], rows: int) -> tuple[float, float]:
    """95% interval of the total over all rows, from a sample without the finite-population gain."""
    mean = float(np.mean(values))
    error = _Z * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return max(0.0, mean - error) * rows, (mean + error) * rows


def _span(interval: tuple[float, float], unit: str = "") -> str:
    low, high = interval
    digits = 2 if unit else 0
    if round(low, digits) == round(high, digits):
        return f"{unit}{low:,.{digits}f}"
    return f"{unit}{low:,.{digits}f} to {unit}{high:,.{digits}f}"
