"""``journeyman curve``: students of a run's recipe that learn fewer of its labels, and what each is
worth alone, in a cascade and beside its teacher.

RUN/curve/   curve.json (the record), labels-N-seed-S.npz (a student's logits on held-out rows: what
             is done once, and not again)

A student is trained in RUN/.curve-work, by the same step as the run's own, and dropped once its
logits are there. `certify` rows are not read, and the bundle is left as it is.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from journeyman import cluster, files, models
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.by_labels import RECORD, Answered, LabelCurve, Rule, answer, points, right
from journeyman.certify.decisions import ScoredRows, rows_of
from journeyman.errors import DataError, RecipeError
from journeyman.folder import Folder
from journeyman.labels import dataset
from journeyman.labels.dataset import ClassRows
from journeyman.labels.store import LabelStore
from journeyman.mirror import Mirror
from journeyman.progress import LiveLine, duration
from journeyman.recipe import Training, digest
from journeyman.steps import Run
from journeyman.student import step, subset
from journeyman.student.inputs import Inputs

_WORK = ".curve-work"
_HELD_OUT = ("calibrate", "test")
# Where the run escalates nothing, or everything, its own share shows nothing.
_A_FIFTH = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Student:
    """What is kept of one. logits: float32[n, c] of each held-out split, rows in corpus order."""

    n_steps: int
    logits: dict[str, npt.NDArray[np.float32]]


def draw(
    run: Run,
    sizes: Sequence[int] = (),
    *,
    n_seeds: int = 1,
    share: float | None = None,
    say: Callable[[str], None],
) -> LabelCurve:
    """Train a student of each number of labels, measure them, and keep the record.

    The run's folder is locked. sizes: numbers of labels, all of them besides; default an eighth, a
    quarter and a half. n_seeds: students of each number, which differ in their rows, their order
    and their first weights. share: to escalate, default the run's own. say: is told of each student
    that is done. Goes on where a killed one stopped.
    Raises RecipeError, DataError, BundleMismatch, ModelError or ClusterError.
    """
    return _Curve(run).draw(sizes, n_seeds, share, say)


def _check(run: Run) -> None:
    """Raises RecipeError where the student is none that a curve can be drawn of."""
    student = run.recipe.learner()
    if student.kind != "classifier" or run.recipe.labels.kind != "classes":
        raise RecipeError(
            "journeyman curve is for classifiers (student.kind: classifier, labels.kind: classes), "
            f"and this recipe has student.kind: {student.kind}, labels.kind: "
            f"{run.recipe.labels.kind}; put runs with other corpus.limits beside each other by "
            "journeyman compare."
        )


class _Curve:
    """The curve of one run."""

    def __init__(self, run: Run) -> None:
        """Raises where the run is not labeled, trained and certified by its recipe."""
        _check(run)
        self._run = run
        run.fetch("train", "certify", "curve")
        self._labels = run.finished_labels()
        self._bundle = self._certified()

    @cached_property
    def _rows(self) -> ClassRows:
        return dataset.read_classes(self._run.labels, self._run.corpus, _HELD_OUT)

    @cached_property
    def _train_ids(self) -> list[str]:
        found: list[str] = []
        for table in dataset.tables(self._run.labels):
            found += table.filter(pc.equal(table["split"], "train"))["id"].to_pylist()
        return found

    def draw(
        self, sizes: Sequence[int], n_seeds: int, share: float | None, say: Callable[[str], None]
    ) -> LabelCurve:
        sizes = self._sizes(sizes)
        held_out = {split: rows_of(self._rows, split) for split in _HELD_OUT}
        rule, own_share = self._rule(share)
        answered: dict[int, list[Answered]] = {size: [] for size in sizes}
        n_steps = {}
        for seed in range(n_seeds):
            for size in sizes:
                student = self._student(size, self._run.recipe.training.seed + seed, say)
                n_steps[size] = student.n_steps
                calibrate, test = (
                    ScoredRows(rows=held_out[split], logits=student.logits[split])
                    for split in _HELD_OUT
                )
                answered[size].append(answer(calibrate, test, rule))
        first = answered[sizes[0]][0]
        curve = LabelCurve(
            student_digest=self._bundle.student_digest,
            against=first.against,
            n=len(first.teacher),
            n_seeds=n_seeds,
            share=rule.share,
            own_share=own_share,
            teacher=right([first.teacher]),
            points=points(answered, n_steps),
        )
        files.write_json(self._run.path("curve") / RECORD, curve.model_dump(mode="json"))
        self._run.mirror("curve").push()
        self._work.remove()
        return curve

    def _certified(self) -> PolicyBundle:
        """The bundle of the student that the recipe trains; raises DataError, BundleMismatch."""
        run = self._run
        folder = run.path("train")
        if not _is_student(folder, self._inputs(run.recipe.training)):
            raise DataError(
                f"{folder}: no student of these labels and settings here; run journeyman train "
                "first."
            )
        bundle = bundles.load(run.path("certify"))
        if bundle.student_digest != models.resolve(str(folder)).weights_digest:
            raise DataError(
                f"{run.path('certify')}: is of another student than {folder}; run journeyman "
                "certify again."
            )
        return bundle

    def _inputs(self, training: Training) -> str:
        return step.inputs_digest(self._run.recipe, training, self._labels, self._run.base_student)

    def _sizes(self, asked: Sequence[int]) -> list[int]:
        """Rising, all labels last."""
        n_all = len(self._train_ids)
        if asked and max(asked) > n_all:
            raise DataError(
                f"--labels {max(asked)}: the run has {n_all:,} labeled train rows; ask for at most "
                "as many, or label more (corpus.limits)."
            )
        return sorted({*(asked or [n_all // part for part in (8, 4, 2) if n_all >= part]), n_all})

    def _rule(self, share: float | None) -> tuple[Rule, float]:
        """Which requests are escalated, and the share that the run's bundle escalates."""
        served, recipe = self._bundle.served, self._run.recipe
        own = 1 - served.n_accepted / served.n if served.n else 1.0
        if share is None:
            share = own if 0 < own < 1 else _A_FIFTH
        rule = Rule(
            score=self._bundle.score,
            kind=served.kind,
            mixes=recipe.cascade.combine == "mixture",
            share=share,
        )
        return rule, own

    # --- students ---

    @property
    def _work(self) -> Mirror:
        url = self._run.recipe.run_url
        return Mirror(local=self._run.directory.absolute() / _WORK, url=url and f"{url}/{_WORK}")

    def _student(self, size: int, seed: int, say: Callable[[str], None]) -> _Student:
        """Read, or trained and kept."""
        recipe, n_all = self._run.recipe, len(self._train_ids)
        name = f"{size:,} labels, seed {seed}"
        own = size == n_all and seed == recipe.training.seed
        training = recipe.training
        if not own:
            training = subset.as_many_steps(training, size, n_all).model_copy(
                update={"seed": seed, "trackers": ()}
            )
        inputs = digest([self._inputs(training), size])
        path = self._run.path("curve") / f"labels-{size}-seed-{seed}.npz"
        if there := _read(path, inputs):
            say(f"{name}: there already")
            return there
        folder = self._run.path("train") if own else self._trained(training, size, inputs, name)
        record = files.read_json(folder / "journeyman.json")
        student = _Student(n_steps=record["steps"], logits=self._logits(folder))
        _keep(path, inputs, student)
        self._run.mirror("curve").push()
        done = "the run's own student" if own else f"trained in {duration(record['seconds'])}"
        say(f"{name}: {done}, {student.n_steps:,} steps")
        return student

    def _trained(self, training: Training, size: int, inputs: str, name: str) -> Path:
        """Its folder."""
        run, folder = self._run, self._work.local / "student"
        if _is_student(folder, inputs):  # killed before its logits were kept
            return folder
        rows = subset.first(self._train_ids, size, training.seed)
        cluster.connect(run.recipe.cluster)
        with LiveLine() as line:
            line.show(f"curve     {name}: starting the workers")
            step.train(
                run.recipe.model_copy(update={"training": training}),
                LabelStore(run.labels).everywhere,
                Folder(run.corpus).everywhere,
                run.base_student,
                run.teacher,
                folder,
                inputs=inputs,
                labels_digest=self._labels["digest"],
                store=self._work.url,
                subset=rows,
                on_progress=lambda progress: line.show(f"curve     {name}\n{progress.text()}"),
            )
        return folder

    def _logits(self, folder: Path) -> dict[str, npt.NDArray[np.float32]]:
        from journeyman.student.models import Classifier

        scorer, inputs = Classifier.load(folder), Inputs(self._run.recipe.learner())
        return {
            split: scorer.logits(inputs.all(self._rows.split(split).columns)) for split in _HELD_OUT
        }


def _is_student(folder: Path, inputs: str) -> bool:
    """Whether a finished one lies there that came of these inputs."""
    path = folder / "journeyman.json"
    record: dict[str, Any] = files.read_json(path) if path.is_file() else {}
    return record.get("inputs") == inputs


def _read(path: Path, inputs: str) -> _Student | None:
    """None where none was kept that came of these inputs; a damaged one is made again."""
    try:
        with np.load(path) as arrays:
            if str(arrays["inputs"]) != inputs:
                return None
            logits = {split: np.asarray(arrays[split], np.float32) for split in _HELD_OUT}
            return _Student(n_steps=int(arrays["n_steps"]), logits=logits)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _keep(path: Path, inputs: str, student: _Student) -> None:
    written = io.BytesIO()
    np.savez(
        written,
        inputs=np.array(inputs),
        n_steps=np.array(student.n_steps),
        calibrate=student.logits["calibrate"],
        test=student.logits["test"],
    )
    files.write_bytes(path, written.getvalue())
