"""A training's live figures as Ray gauges, which Prometheus reads on rank 0's node."""

from __future__ import annotations

import threading

from journeyman.student.checkpoints import Evaluation
from journeyman.student.live import TrainProgress

PREFIX = "journeyman_train_"
_AGAIN_S = 5.0

# Gauge to the field that it shows, and what Prometheus is told of it.
_OF_PROGRESS = {
    "step": ("step", "Optimizer steps done."),
    "total_steps": ("total_steps", "Optimizer steps that the recipe asks for."),
    "epoch": ("epoch", "Epoch under way, from 1."),
    "loss": ("loss", "Mean over the steps since the curve's last record, nats."),
    "rows_per_second": ("rows_per_s", "Of the last half minute, over all workers."),
    "tokens_per_second": ("tokens_per_s", "Of the last half minute, padding not counted."),
    "eta_seconds": ("eta_s", "Time to go, evaluations and checkpoints included."),
    "mfu": ("mfu", "Model FLOPs utilisation, 0 to 1; of devices with a known peak."),
    "missing_workers": ("missing_workers", "Workers fewer than the recipe asks for."),
}
_OF_EVALUATION = {
    "agreement": (
        "agreement",
        "Share of the teacher's first choices, of its draws, or of the text's own tokens, 0 to 1.",
    ),
    "kl": ("kl", "KL(teacher, student), nats; of students that learn distributions."),
    "cross_entropy": ("cross_entropy", "Of the teacher's draws, or of the text, nats a token."),
    "accuracy": ("gold_accuracy", "Share right, of held-out rows that have gold."),
    "perplexity": ("perplexity", "Of the held-out text's own tokens."),
    "exact_match": ("exact_match", "Share of held-out texts that are written to the letter."),
    "calibration_error": ("calibration_error", "Expected, against the teacher's first choice."),
    "gold_calibration_error": ("gold_calibration_error", "Expected, against gold."),
}
NAMES = tuple(f"{PREFIX}{name}" for name in (*_OF_PROGRESS, *_OF_EVALUATION))


class Gauges:
    """What the live line says, and the newest evaluation, tagged with the run's name.

    A figure that is not known (None, which Ray's gauges pass over) has no series. Ray (2.60)
    forgets a gauge that nobody sets for twenty seconds, which a step or an evaluation may take:
    each is set again until ``close``.
    """

    def __init__(self, run: str, again_s: float = _AGAIN_S) -> None:
        from ray.util import metrics

        self._gauges = {
            name: metrics.Gauge(
                f"{PREFIX}{name}", f"Training: {said}", tag_keys=("run",)
            ).set_default_tags({"run": run})
            for name, (_, said) in (_OF_PROGRESS | _OF_EVALUATION).items()
        }
        self._figures: dict[str, float | None] = {}
        self._again_s = again_s
        self._closed = threading.Event()
        threading.Thread(target=self._keep, name="gauges", daemon=True).start()

    def show(self, progress: TrainProgress, newest: Evaluation | None) -> None:
        self._figures = {
            name: getattr(progress, field) for name, (field, _) in _OF_PROGRESS.items()
        } | {name: getattr(newest, field, None) for name, (field, _) in _OF_EVALUATION.items()}
        self._set()

    def close(self) -> None:
        self._closed.set()

    def _keep(self) -> None:
        while not self._closed.wait(self._again_s):
            self._set()

    def _set(self) -> None:
        for name, figure in self._figures.items():
            self._gauges[name].set(figure)
