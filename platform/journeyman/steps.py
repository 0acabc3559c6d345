"""The steps of a run, in order: each reads one folder, writes one, and is skipped when what it
would read has not changed since it wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from journeyman import cluster, corpus, files, models, sources
from journeyman.errors import JourneymanError
from journeyman.labels import dataset, pipeline
from journeyman.labels.pipeline import LabelProgress
from journeyman.labels.store import LabelStore
from journeyman.progress import LiveLine, duration
from journeyman.recipe import Recipe, digest
from journeyman.run_folder import RunFolder
from journeyman.teacher.tasks import prompt_digest

NAMES = ("prepare", "label", "train", "certify", "measure", "report")
MANIFEST = "manifest.json"
_STUDENT_MANIFEST = "journeyman.json"
# Test rows that are sent over HTTP, and how many of them student and teacher each answer alone.
_SENT, _COMPARED = 200, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did: its manifest, and how long it took this time (None if skipped)."""

    name: str
    manifest: dict[str, Any]
    seconds: float | None


class Run(RunFolder):
    """One recipe's run folder and the steps that fill it."""

    def execute(self, step: str, *, new_labels: bool = False) -> StepResult:
        """Run one step, or skip it if it is done for the same inputs."""
        steps: dict[str, Callable[[], tuple[dict[str, Any], bool]]] = {
            "prepare": self._prepare,
            "label": lambda: self._label(new=new_labels),
            "train": self._train,
            "certify": self._certify,
            "measure": self._measure,
            "report": self._report,
        }
        started = time.monotonic()
        manifest, did = steps[step]()
        seconds = time.monotonic() - started if did else None
        return StepResult(name=step, manifest=manifest, seconds=seconds)

    def _prepare(self) -> tuple[dict[str, Any], bool]:
        folder = self.path("prepare")
        urls = sources.expand(self.recipe.corpus.sources)
        there = _read(folder / MANIFEST)
        if there and there.get("inputs") == corpus.inputs_digest(self.recipe, urls):
            return there, False
        return corpus.prepare(self.recipe, folder), True

    def _label(self, new: bool) -> tuple[dict[str, Any], bool]:
        folder, corpus_dir = self.path("label"), self.path("prepare")
        if new:
            files.set_aside(folder)
        store = LabelStore(folder)
        identity = pipeline.identity(
            self.recipe, self.teacher, corpus.read_manifest(corpus_dir)["digest"]
        )
        store.open(identity)
        there = store.manifest()
        if there.get("complete"):
            return there, False
        started = time.monotonic()
        cluster.connect(self.recipe.cluster)
        with LiveLine() as line:
            line.show("label     starting the teacher")
            manifest = pipeline.label(
                self.recipe,
                self.teacher,
                corpus_dir,
                folder,
                lambda progress: line.show(_label_line(progress)),
            )
        seconds = round(time.monotonic() - started, 3)
        return store.finish({"seconds": manifest.get("seconds", 0.0) + seconds}), True

    def _train(self) -> tuple[dict[str, Any], bool]:
        from journeyman.student import loop

        folder, labels_dir = self.path("train"), self.path("label")
        labels = dataset.finished_manifest(LabelStore(labels_dir))
        inputs = digest(
            [
                labels["digest"],
                labels["log_prior"],
                self.base_student.identity,
                self.recipe.student.model_dump(mode="json"),
                self.recipe.training.model_dump(mode="json"),
            ]
        )
        there = _read(folder / _STUDENT_MANIFEST)
        if there and there.get("inputs") == inputs:
            return there, False
        cluster.connect(self.recipe.cluster)
        read_rows = partial(
            dataset.read_classes,
            labels_dir.resolve(),
            self.path("prepare").resolve(),
            ("train", "calibrate"),
        )
        with LiveLine() as line:
            line.show("train     starting the workers")
            loop.train(
                self.recipe,
                read_rows,
                self.base_student,
                folder,
                inputs=inputs,
                labels_digest=labels["digest"],
                on_progress=lambda progress: line.show(f"train     {progress}"),
            )
        return files.read_json(folder / _STUDENT_MANIFEST), True

    def _certify(self) -> tuple[dict[str, Any], bool]:
        from journeyman.certify import step
        from journeyman.student.models import Classifier

        folder = self.path("certify")
        labels = dataset.finished_manifest(LabelStore(self.path("label")))
        student = models.resolve(str(self.path("train")))
        inputs = digest(
            [
                labels["digest"],
                labels["log_prior"],
                student.weights_digest,
                prompt_digest(self.recipe.labels),
                self.recipe.certify.model_dump(mode="json"),
            ]
        )
        there = _read(folder / MANIFEST)
        if there and there.get("inputs") == inputs:
            return there, False
        rows = dataset.read_classes(self.path("label"), self.path("prepare"))
        step.certify(
            self.recipe,
            rows,
            labels["log_prior"],
            Classifier.load(self.path("train")),
            student,
            self.teacher,
            folder,
            inputs=inputs,
        )
        return files.read_json(folder / MANIFEST), True

    def _measure(self) -> tuple[dict[str, Any], bool]:
        from journeyman import traffic

        folder = self.path("measure")
        bundle = files.read_json(self.path("certify") / MANIFEST)["bundle"]
        inputs = digest([bundle, self.recipe.cascade.model_dump(mode="json")])
        there = _read(folder / MANIFEST)
        if there and there.get("inputs") == inputs:
            return there, False
        started = time.monotonic()
        cluster.connect(self.recipe.cluster)
        rows = dataset.read_classes(self.path("label"), self.path("prepare"), ("test",))
        with LiveLine() as line:
            line.show("measure   starting the cascade")
            with cluster.serve_module("running").running(self.path("certify")) as base_url:
                measured = traffic.send(
                    base_url,
                    rows.texts[:_SENT],
                    _COMPARED,
                    lambda text: line.show(f"measure   {text}"),
                )
        seconds = round(time.monotonic() - started, 3)
        manifest = {"step": "measure", "inputs": inputs, "seconds": seconds, **measured.manifest()}
        files.write_json(folder / MANIFEST, manifest)
        return manifest, True

    def _report(self) -> tuple[dict[str, Any], bool]:
        from journeyman import summary
        from journeyman.report import page

        data = summary.report_data(self)
        path = page.write(data, self.path("report"))
        return {"page": str(path)}, True


def _read(path: Path) -> dict[str, Any] | None:
    """A manifest, where there is a readable one: without it the step runs again."""
    try:
        return files.read_json(path) if path.exists() else None
    except JourneymanError:
        return None


def _label_line(progress: LabelProgress) -> str:
    if not progress.rows_per_s:
        return f"label     {progress.rows_done:,}/{progress.rows:,} rows, starting"
    eta = duration(progress.eta_s) if progress.eta_s is not None else "?"
    return (
        f"label     {progress.rows_done:,}/{progress.rows:,} rows  {progress.rows_per_s:.1f} rows/s"
        f"  {progress.tokens_per_s:,.0f} tokens/s  quarantined {progress.quarantined}  ETA {eta}"
    )


Reporter = Callable[[StepResult], None]


def run(recipe: Recipe, report: Reporter, *, new_labels: bool = False) -> list[StepResult]:
    """All steps of a recipe; what is done already for the same inputs is skipped."""
    results = []
    current = Run(recipe)
    with current.locked():
        for name in NAMES:
            result = current.execute(name, new_labels=new_labels)
            report(result)
            results.append(result)
    return results
