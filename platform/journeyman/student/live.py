"""How a training stands, from second to second: what rank 0 says of it, and a line for a person."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from journeyman.progress import duration
from journeyman.student.learner import AGREES_WITH, Against

WINDOW_S = 30.0  # what the live view's rates are means over


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """Where a training stands; rates are those of the last half minute."""

    step: int
    total_steps: int
    epoch: int  # under way, from 1
    epochs: int
    loss: float  # nats, mean since the curve's last record
    rows_per_s: float
    tokens_per_s: float  # without padding, over all workers
    eta_s: float  # evaluations and checkpoints included, as they have been so far
    mfu: float | None = None  # 0 to 1, where the peak of the device is known
    agreement: float | None = None  # at the last evaluation, like the three below
    against: Against = "distributions"
    calibration_error: float | None = None
    perplexity: float | None = None
    evaluating: bool = False
    stopped_early: bool = False
    missing_workers: int = 0  # of those that the recipe asks for

    def text(self) -> str:
        """Two lines for a person: how far, and how good and fast."""
        to_go = f"{duration(self.eta_s)} to go"
        if self.stopped_early:
            to_go = "stopped early"
        elif self.evaluating:
            to_go += ", evaluating"
        with_what = "" if self.against == "distributions" else f" with {AGREES_WITH[self.against]}"
        measured = "".join(
            f"{name} {value:{form}}, "
            for name, value, form in (
                (f"agreement{with_what}", self.agreement, ".3f"),
                ("ECE", self.calibration_error, ".3f"),
                ("perplexity", self.perplexity, ",.1f"),
            )
            if value is not None
        )
        speed = f"{self.rows_per_s:,.0f} rows/s, {self.tokens_per_s:,.0f} tokens/s"
        if self.mfu is not None:
            speed += f", MFU {self.mfu:.0%}"
        if self.missing_workers:
            speed += f", {self.missing_workers} of its workers missing"
        return (
            f"train     epoch {self.epoch}/{self.epochs}, step {self.step:,}/{self.total_steps:,}, "
            f"loss {self.loss:.3f}, {to_go}\n          {measured}{speed}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadProgress:
    """Before the first step: how many rows were made of labels."""

    rows: int
    done: bool = False

    def text(self) -> str:
        if self.done:
            return "train     starting the workers"
        return f"train     reading the labels: {self.rows:,} rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of some steps, over all workers."""

    rows_per_s: float
    tokens_per_s: float
    flops_per_s: float


class Pace:
    """Turns what steps did into rates; pauses count for nothing."""

    def __init__(
        self, window_s: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """window_s: steps that ended longer ago, in time spent on steps, are forgotten."""
        self._window_s, self._clock = window_s, clock
        self._steps: deque[tuple[float, float, float, float]] = deque()
        self._seconds = 0.0
        self._began = clock()

    def add(self, rows: float, tokens: float, flops: float) -> None:
        """A step that ends now."""
        now = self._clock()
        self._steps.append((now - self._began, rows, tokens, flops))
        self._seconds += now - self._began
        self._began = now
        while len(self._steps) > 1 and self._seconds > self._window_s:
            self._seconds -= self._steps.popleft()[0]

    def go_on(self) -> None:
        """Steps begin again, behind a pause."""
        self._began = self._clock()

    def rates(self) -> Rates:
        """Of at least one step."""
        _, rows, tokens, flops = map(sum, zip(*self._steps, strict=True))
        seconds = max(self._seconds, 1e-9)
        return Rates(
            rows_per_s=rows / seconds,
            tokens_per_s=tokens / seconds,
            flops_per_s=flops / seconds,
        )
