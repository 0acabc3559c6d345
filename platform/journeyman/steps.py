"""The steps of a run, in order: each reads one folder, writes one, and is skipped when what it
would read has not changed since it wrote.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from journeyman import cluster, corpus, files, models, traffic
from journeyman.cascade import keys
from journeyman.certify import bundle_recipe
from journeyman.errors import DataError, JourneymanError, RecipeError
from journeyman.folder import Folder
from journeyman.labels import cost, dataset, ensemble, pipeline
from journeyman.labels.cost import Estimate
from journeyman.labels.progress import LabelProgress
from journeyman.labels.store import LabelStore
from journeyman.progress import LiveLine
from journeyman.recipe import Recipe, digest
from journeyman.run_folder import RunFolder
from journeyman.teacher.tasks import prompt_digest

NAMES = ("prepare", "label", "train", "certify", "measure", "report")
MANIFEST = "manifest.json"
# What a step wants of its own run on this machine. Corpus and labels are read where they lie.
_READS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "label": (),
    "train": ("train",),
    "certify": ("train", "certify"),
    "measure": ("train", "certify", "measure"),
    "report": ("train", "certify", "measure", "curve", "report"),
}
_STUDENT_MANIFEST = "journeyman.json"
# Test rows that are sent over HTTP, and how many of them student and teacher each answer alone.
_SENT, _COMPARED = 200, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did: its manifest, and how long it took this time (None if skipped); note: what
    else there is to say."""

    name: str
    manifest: dict[str, Any]
    seconds: float | None
    note: str = ""


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
        self._fetch(step)
        started = time.monotonic()
        manifest, did = steps[step]()
        if did and step in _READS[step]:
            self.mirror(step).push()
        seconds = time.monotonic() - started if did else None
        note = ""
        if step == "certify" and not did:  # settings of serving may have changed all the same
            note = bundle_recipe.take_up(self.mirror(step), self.recipe).text()
        return StepResult(name=step, manifest=manifest, seconds=seconds, note=note)

    def _fetch(self, step: str) -> None:
        """What a step reads, where the run is in a store; of its own what can be had."""
        if not self.recipe.run_url:
            return
        self.fetch(*(name for name in _READS[step] if name != step))
        if step not in _READS[step]:
            return
        with contextlib.suppress(DataError):  # damaged: it is made again
            self.fetch(step)
        if step == "certify":
            self._fetch_ledger()

    def _fetch_ledger(self) -> None:
        """A bundle that was not wholly put says all the same what its certify rows have spent."""
        from journeyman.certify.bundle import BUNDLE_FILE

        mirror = self.mirror("certify")
        path = mirror.local / BUNDLE_FILE
        if mirror.url and not path.exists():
            with contextlib.suppress(FileNotFoundError):
                files.write_bytes(path, Folder(mirror.url).get(BUNDLE_FILE))

    def _prepare(self) -> tuple[dict[str, Any], bool]:
        urls = corpus.source_urls(self.recipe.corpus)
        with contextlib.suppress(DataError):  # there is none, or it has to be written again
            there = corpus.read_manifest(self.corpus)
            if there.get("inputs") == corpus.inputs_digest(self.recipe, urls):
                return there, False
        folder = self.mirror("prepare")
        manifest = corpus.prepare(self.recipe, folder.local)
        if folder.url:  # which is where all read it
            folder.push()
            shutil.rmtree(folder.local)
        return manifest, True

    def _label(self, new: bool) -> tuple[dict[str, Any], bool]:
        from journeyman.labels import finishing

        if new:
            self._set_labels_aside()
        store = LabelStore(self.labels)
        store.open(self._identity())
        there = store.manifest()
        if there.get("complete"):
            # Filters may have changed: they are over finished labels, and cost the teacher nothing.
            now = finishing.complete(store, self.recipe)
            return now, now["filtered"] != there["filtered"]
        return self._labeled(requeue=False), True

    def requeue(self) -> StepResult:
        """Label the rows in quarantine again."""
        if self.recipe.ensemble:
            raise RecipeError("labels requeue works on one teacher's labels, not on an ensemble's.")
        started = time.monotonic()
        self.finished_labels()
        manifest = self._labeled(requeue=True)
        return StepResult(name="requeue", manifest=manifest, seconds=time.monotonic() - started)

    def estimate(self, n_rows: int) -> Estimate:
        """What labeling the rows still to do will take, from trying so many of them."""
        cluster.connect(self.recipe.cluster)
        with LiveLine() as line:
            line.show(f"label     starting the teacher to try {n_rows} rows")
            return pipeline.estimated(self.recipe, self.teacher, self.corpus, self.labels, n_rows)

    def _identity(self) -> dict[str, Any]:
        corpus_digest = corpus.read_manifest(self.corpus)["digest"]
        own = pipeline.identity(self.recipe, self.teacher, corpus_digest)
        if not self.recipe.ensemble:
            return own
        others = {
            name: pipeline.identity(self.recipe, models.teacher(teacher), corpus_digest, teacher)
            for name, teacher in self.recipe.ensemble.items()
        }
        return ensemble.identity({"teacher": own} | others)

    def _labeled(self, *, requeue: bool) -> dict[str, Any]:
        started = time.monotonic()
        cluster.connect(self.recipe.cluster)
        with LiveLine() as line:
            line.show("label     starting the teacher")

            def show(progress: LabelProgress) -> None:
                line.show(progress.text())

            if self.recipe.ensemble:
                manifest = pipeline.label_ensemble(
                    self.recipe, self.teacher, self.corpus, self.labels, show
                )
            else:
                manifest = pipeline.label(
                    self.recipe, self.teacher, self.corpus, self.labels, show,
                    requeue=requeue,
                )  # fmt: skip
        seconds = round(time.monotonic() - started, 3)
        store = LabelStore(self.labels)
        return store.finish({"seconds": manifest.get("seconds", 0.0) + seconds})

    def _set_labels_aside(self) -> None:
        directory = LabelStore(self.labels).directory
        if directory is None:
            raise RecipeError(
                f"--new keeps the old labels as a folder beside the new ones, and {self.labels} is "
                "no local folder; name another labels.destination instead."
            )
        files.set_aside(directory)

    def finished_labels(self) -> dict[str, Any]:
        """Their manifest; raises DataError where they are not finished, or not the recipe's."""
        manifest = dataset.finished_manifest(LabelStore(self.labels))
        dataset.check_asked(self.labels, manifest["identity"], self.recipe.labels)
        return manifest

    def _train(self) -> tuple[dict[str, Any], bool]:
        from journeyman.student import loop, on_policy, step

        folder, training = self.path("train"), self.recipe.training
        step.check(self.recipe)
        labels = self.finished_labels()
        inputs = step.inputs_digest(self.recipe, training, labels, self.base_student)
        there = _read(folder / _STUDENT_MANIFEST)
        if there and there.get("inputs") == inputs:
            # What a run that was killed at its very end has left.
            loop.clear_work(folder, inputs, self.recipe.run_url)
            return there, False
        cluster.connect(self.recipe.cluster)
        lacking = cluster.lacking(
            training.resources(), "training.workers or training.cpus_per_worker"
        )
        with LiveLine() as line:
            line.show(
                f"train     {f'waiting for {lacking}' if lacking else 'starting the workers'}"
            )
            given = (
                self.recipe,
                LabelStore(self.labels).everywhere,
                Folder(self.corpus).everywhere,
                self.base_student,
                self.teacher,
                folder,
            )
            if training.on_policy:
                without = training.model_copy(update={"on_policy": None})
                on_policy.train(
                    *given,
                    inputs=inputs,
                    start_inputs=step.inputs_digest(
                        self.recipe, without, labels, self.base_student
                    ),
                    labels_digest=labels["digest"],
                    show=line.show,
                )
            else:
                step.train(
                    *given,
                    inputs=inputs,
                    labels_digest=labels["digest"],
                    store=self.recipe.run_url,
                    on_progress=lambda progress: line.show(progress.text()),
                )
        return files.read_json(folder / _STUDENT_MANIFEST), True

    def _certify(self) -> tuple[dict[str, Any], bool]:
        if self.recipe.learner().kind == "causal":
            return self._certify_written()
        from journeyman.certify import asked, step
        from journeyman.student.models import Classifier

        folder = self.path("certify")
        labels = self.finished_labels()
        student = models.resolve(str(self.path("train")))
        before = asked.before(self.recipe, labels, corpus.prompt_columns(self.recipe), student)
        inputs = digest(
            [
                labels["digest"],
                labels["filtered"]["inputs"],
                student.weights_digest,
                prompt_digest(self.recipe.classes()),
                self.recipe.certify.decisive(),
                *(["mixture"] if self.recipe.cascade.combine == "mixture" else []),
                *(one.model.weights_digest for one in before),
            ]
        )
        if there := bundle_recipe.certified(folder, inputs):
            return there, False
        rows = dataset.read_classes(self.labels, self.corpus)
        step.certify(
            self.recipe,
            rows,
            labels["log_prior"],
            Classifier.load(self.path("train")),
            student,
            self.teacher,
            folder,
            inputs=inputs,
            n_groups=corpus.read_manifest(self.corpus).get("groups", {}).get("certify"),
            before=before,
            teacher_seconds=cost.seconds_a_row(labels["totals"]),
            repeats=corpus.repeats(self.corpus, "certify"),
            shared=self.ledger,
        )
        return files.read_json(folder / MANIFEST), True

    def _certify_written(self) -> tuple[dict[str, Any], bool]:
        """Of a student that writes, which answers the held-out rows first."""
        from journeyman.certify import written

        folder = self.path("certify")
        written.check(self.recipe)
        labels = self.finished_labels()
        student = models.resolve(str(self.path("train")))
        inputs = written.inputs_digest(self.recipe, labels, student)
        if there := bundle_recipe.certified(folder, inputs):
            return there, False
        cluster.connect(self.recipe.cluster)
        with LiveLine() as line:
            line.show("certify   what the held-out rows are answered with, starting an engine")

            def show(progress: LabelProgress) -> None:
                line.show(f"certify   what the held-out rows are answered with\n{progress.text()}")

            written.certify(
                self.recipe,
                self.labels,
                self.corpus,
                student,
                self.teacher,
                self.directory / "answers",
                folder,
                inputs=inputs,
                on_progress=show,
                shared=self.ledger,
            )
        return files.read_json(folder / MANIFEST), True

    def _measure(self) -> tuple[dict[str, Any], bool]:
        folder, certified = self.path("measure"), self.path("certify")
        served = bundle_recipe.recipe_of(certified).cascade.model_dump(mode="json")
        inputs = digest([files.read_json(certified / MANIFEST)["bundle"], served])
        there = _read(folder / MANIFEST)
        if there and there.get("inputs") == inputs:
            return there, False
        started = time.monotonic()
        cluster.connect(self.recipe.cluster)
        rows = dataset.read_classes(self.labels, self.corpus, ("test",))
        sent = rows.take(np.argsort(rows.ids)[:_SENT])  # at random: a group's stand together
        bundle_folder = self.mirror("certify").url or self.path("certify")
        with LiveLine() as line:
            line.show("measure   starting the cascade")
            running, key = cluster.serve_module("running").running, keys.new_key()
            own = {"may_ask": keys.alone(key), "keeps_feedback": False}
            with running(bundle_folder, **own) as base_url:
                measured = traffic.send(
                    base_url,
                    key,
                    [self._request(row) for row in sent.columns],
                    _COMPARED,
                    lambda text: line.show(f"measure   {text}"),
                )
        seconds = round(time.monotonic() - started, 3)
        manifest = {"step": "measure", "inputs": inputs, "seconds": seconds,
                    "hardware": cluster.hardware(), **measured.manifest()}  # fmt: skip
        with files.replaced_directory(folder) as fresh:
            files.write_json(fresh / MANIFEST, manifest)
        return manifest, True

    def _request(self, row: dict[str, Any]) -> traffic.Row:
        """A row as a client would send it."""
        named = corpus.prompt_columns(self.recipe)
        return row["text"] if named == ["text"] else {name: str(row[name]) for name in named}

    def _report(self) -> tuple[dict[str, Any], bool]:
        from journeyman import summary
        from journeyman.report import page
        from journeyman.report import written as written_page
        from journeyman.summary import written

        if self.recipe.learner().kind == "causal":
            path = written_page.write(written.written_data(self), self.path("report"))
        else:
            path = page.write(summary.report_data(self), self.path("report"))
        return {"page": str(path)}, True


def _read(path: Path) -> dict[str, Any] | None:
    """A manifest, where there is a readable one: without it the step runs again."""
    try:
        return files.read_json(path) if path.exists() else None
    except JourneymanError:
        return None


def names(recipe: Recipe) -> tuple[str, ...]:
    """The steps of a recipe. Labeling alone needs no student, and one that writes is certified when
    it is asked for, by the command or with ``certify.complete``: the held-out rows have to be
    written for it. What a cascade kept is certified by the command."""
    if recipe.student is None:
        return NAMES[: NAMES.index("train")]
    if recipe.learner().kind == "causal":
        elsewhere = recipe.corpus.feedback or recipe.run_url  # a command, or not there yet
        certifies = recipe.certify.complete is not None and not elsewhere
        return ("prepare", "label", "train", *(["certify"] if certifies else []), "report")
    return NAMES


Reporter = Callable[[StepResult], None]


def check(recipe: Recipe) -> None:
    """Raises RecipeError where the student cannot learn, or not be certified, as it says."""
    from journeyman.certify import written
    from journeyman.student import step

    step.check(recipe)
    if recipe.learner().kind == "causal" and "certify" in names(recipe):
        written.check(recipe)


def run(recipe: Recipe, report: Reporter, *, new_labels: bool = False) -> list[StepResult]:
    """All steps of a recipe; what is done already for the same inputs is skipped."""
    from journeyman.student import step

    results = []
    current = Run(recipe)
    if recipe.student is not None:  # before labels are paid for
        check(recipe)
        step.check_vocabulary(recipe, current.base_student, current.teacher)
    with current.locked():
        for name in names(recipe):
            result = current.execute(name, new_labels=new_labels)
            report(result)
            results.append(result)
    return results
