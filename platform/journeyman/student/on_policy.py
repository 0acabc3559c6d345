"""On-policy rounds: the student answers train prompts, the teacher says at each of its tokens what
it would have gone on with, and the student learns from that (GKD, Agarwal et al. 2024).

    on_policy/start/            the student that has learned the teacher's own answers
    on_policy/round-00/         round.json: digest of all that decides the round
        prompts/  answers/      train prompts; a label dataset: what the student wrote (generate)
        written/  scores/       the same as a corpus; a label dataset: the teacher's (logits)
        student/                the next round's student

Each of these is done when it is whole, and goes on where it was killed, as the steps do that it is
made with. Nothing here knows an engine or a loss.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from journeyman import corpus, files, models
from journeyman.errors import DataError
from journeyman.labels import dataset, pipeline
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Generate, Logits, OnPolicy, Recipe, Training, digest
from journeyman.student import export, loop, round_corpus, step, writing
from journeyman.student.checkpoints import Evaluation

_RECORD = "journeyman.json"


def train(
    recipe: Recipe,
    labels: str | Path,
    corpus_dir: str | Path,
    parent: Model,
    teacher: Model,
    out_dir: Path,
    *,
    inputs: str,
    start_inputs: str,
    labels_digest: str,
    show: Callable[[str], None],
) -> None:
    """The recipe's student after all rounds of ``training.on_policy``, in out_dir.

    As ``step.train``; start_inputs: what ``inputs`` would be without rounds, of the student that
    the first one begins with. Raises RecipeError, DataError, ModelError or ClusterError.
    """
    step.check_vocabulary(recipe, parent, teacher)  # before a round is paid for
    out_dir = out_dir.absolute()
    rounds = _Rounds(recipe, labels, corpus_dir, parent, teacher, out_dir, labels_digest, show)
    student = rounds.start(start_inputs)
    records = [files.read_json(student.path / _RECORD)]
    for number in range(rounds.settings.rounds):
        student = rounds.round(number, student)
        records.append(files.read_json(student.path / _RECORD))
    _take(student.path, out_dir, records, inputs, recipe, parent)
    loop.clear_work(out_dir, inputs)


class _Rounds:
    """One run's rounds."""

    def __init__(
        self,
        recipe: Recipe,
        labels: str | Path,
        corpus_dir: str | Path,
        parent: Model,
        teacher: Model,
        out_dir: Path,
        labels_digest: str,
        show: Callable[[str], None],
    ) -> None:
        assert recipe.training.on_policy is not None and isinstance(recipe.labels, Generate)
        self.settings: OnPolicy = recipe.training.on_policy
        self._asked = recipe.labels
        self._recipe = recipe
        self._labels = labels
        self._corpus_dir = corpus_dir
        self._parent = parent
        self._teacher = teacher
        self._out_dir = out_dir
        self._labels_digest = labels_digest
        self._show = show
        self._folder = out_dir.parent / "on_policy"

    def start(self, inputs: str) -> Model:
        """The student of the teacher's own answers; one that was trained without rounds is it."""
        folder = self._folder / "start"
        if not _is_done(folder, inputs):
            if _is_done(self._out_dir, inputs):
                _copy(self._out_dir, folder)
            else:
                training = self._recipe.training.model_copy(update={"on_policy": None})
                step.train(
                    self._recipe.model_copy(update={"training": training}),
                    self._labels,
                    self._corpus_dir,
                    self._parent,
                    self._teacher,
                    folder,
                    inputs=inputs,
                    labels_digest=self._labels_digest,
                    on_progress=lambda progress: self._show(progress.text()),
                )
        return models.resolve(str(folder))

    def round(self, number: int, student: Model) -> Model:
        """The student after this round."""
        folder = self._folder / f"round-{number:02d}"
        inputs = self._inputs(number, student)
        if not _begun(folder, inputs):  # a round of other settings, or of another student
            with files.replaced_directory(folder) as fresh:
                files.write_json(fresh / "round.json", {"round": number, "inputs": inputs})
        if not _is_done(folder / "student", inputs):
            self._answer(folder, number, student)
            scoring = self._score(folder, number)
            self._learn(folder, number, student, scoring, inputs)
        return models.resolve(str(folder / "student"))

    def _inputs(self, number: int, student: Model) -> str:
        """Digest of all that decides a round; of the settings, all but how many rounds follow."""
        settings = self.settings.model_dump(mode="json", exclude={"rounds"})
        training = self._recipe.training.model_copy(update={"on_policy": None}).decisive()
        learner = self._recipe.learner().model_dump(mode="json")
        corpus_digest = corpus.read_manifest(self._corpus_dir)["digest"]
        asked = pipeline.identity(self._recipe, self._teacher, corpus_digest)
        return digest([number, student.weights_digest, student.tokenizer_digest, asked,
                       self._labels_digest, learner, training, settings])  # fmt: skip

    def _answer(self, folder: Path, number: int, student: Model) -> None:
        if not (folder / "prompts" / "manifest.json").exists():
            round_corpus.write_prompts(
                self._corpus_dir, folder / "prompts", number, self.settings.share,
                self._recipe.corpus.rows_per_shard,
            )  # fmt: skip
        asked = writing.asked_of_student(
            self._asked, max_tokens=self.settings.max_tokens, top_p=1.0,
            temperature=self.settings.temperature,
        )  # fmt: skip
        self._label(
            writing.written_by(self._recipe, student.path, asked),
            student, folder / "prompts", folder / "answers", number, "the student answers",
        )  # fmt: skip

    def _score(self, folder: Path, number: int) -> Logits:
        """Returns what was asked of the teacher."""
        if not (folder / "written" / "manifest.json").exists():
            round_corpus.write_written(folder / "prompts", folder / "answers", folder / "written")
        asked = self._asked
        scoring = Logits(
            context=asked.prompt, chat=asked.chat, system=asked.system, examples=asked.examples,
            tokens=round_corpus.TOKENS, codec=asked.codec, k=asked.k,
            shards_in_flight=asked.shards_in_flight, max_attempts=asked.max_attempts,
            max_quarantined=asked.max_quarantined,
        )  # fmt: skip
        self._label(
            self._recipe.model_copy(update={"labels": scoring}),
            self._teacher, folder / "written", folder / "scores", number, "the teacher scores",
        )  # fmt: skip
        return scoring

    def _label(
        self,
        recipe: Recipe,
        model: Model,
        corpus_dir: str | Path,
        labels: Path,
        number: int,
        what: str,
    ) -> None:
        if dataset.is_finished(labels):
            return
        doing = f"train     round {number + 1}/{self.settings.rounds}: {what}"
        self._show(f"{doing}, starting its engine")

        def show(progress: Any) -> None:
            self._show(f"{doing}\n{progress.text()}")

        pipeline.label(recipe, model, corpus_dir, labels, show)

    def _learn(
        self, folder: Path, number: int, student: Model, scoring: Logits, inputs: str
    ) -> None:
        trained = folder / "student"
        learner = self._recipe.learner().model_copy(
            update={"model": str(student.path), "revision": None, "start": "pretrained",
                    "layers": None, "layer_choice": "even", "config": {}}
        )  # fmt: skip
        recipe = self._recipe.model_copy(
            update={"labels": scoring, "training": self._training(), "student": learner}
        )
        rows = loop.work_folder(trained, inputs).below("rows")
        given = (student, self._teacher, rows.local)
        doing = f"train     round {number + 1}/{self.settings.rounds}"
        over = step.told(lambda progress: self._show(f"{doing}\n{progress.text()}"))
        step.write_rows(
            recipe, folder / "scores", folder / "written", *given, ("train",), over=over
        )
        step.write_rows(
            self._recipe, self._labels, self._corpus_dir, *given, ("calibrate",), over=over
        )
        loop.train(
            recipe,
            step.causal_load(recipe, student, rows),
            dataclasses.replace(student, reference=self._parent.reference),  # as its card names it
            trained,
            inputs=inputs,
            labels_digest=dataset.finished_manifest(LabelStore(folder / "scores"))["digest"],
            on_progress=lambda progress: self._show(f"{doing}\n{progress.text()}"),
        )

    def _training(self) -> Training:
        """Of a round: its own words are nothing to learn, and no row weighs more than another."""
        settings, training = self.settings, self._recipe.training
        return training.model_copy(
            update={"on_policy": None, "divergence": settings.divergence,
                    "epochs": settings.epochs, "cross_entropy": 0.0, "row_weight": "none",
                    "learning_rate": settings.learning_rate or training.learning_rate}
        )  # fmt: skip


def _begun(folder: Path, inputs: str) -> bool:
    return _has(folder / "round.json", inputs)


def _is_done(student: Path, inputs: str) -> bool:
    return _has(student / _RECORD, inputs)


def _has(path: Path, inputs: str) -> bool:
    try:
        return path.exists() and bool(files.read_json(path).get("inputs") == inputs)
    except DataError:  # damaged: what it speaks for is made again
        return False


def _copy(student: Path, folder: Path) -> None:
    with files.replaced_directory(folder) as fresh:
        shutil.copytree(student, fresh, dirs_exist_ok=True)


def _take(
    last: Path,
    out_dir: Path,
    records: list[dict[str, Any]],
    inputs: str,
    recipe: Recipe,
    parent: Model,
) -> None:
    """The last round's student as the run's own, with what all of them learned and took."""
    trained = [export.state_of(record) for record in records]
    record = records[-1] | {
        "inputs": inputs,
        "recipe": recipe.hash,
        "labels": records[0]["labels"],  # the teacher's own answers
        "parent": parent.identity,
        "rows": sum(one.n_rows for one in trained),
        "steps": sum(one.step for one in trained),
        "planned_steps": sum(one.total_steps for one in trained),
        "stopped_early": any(one.stopped_early for one in trained),
        "seconds": round(sum(one.seconds for one in trained), 3),
        "on_policy": [{"labels": r["labels"], "rows": r["rows"], "best": r["best"]}
                      for r in records],
    }  # fmt: skip
    origin = export.Provenance(
        recipe=recipe,
        parent=parent,
        inputs=inputs,
        labels_digest=record["labels"],
        world_size=record["world_size"],
        hardware=record["hardware"],
    )
    with files.replaced_directory(out_dir) as fresh:
        shutil.copytree(last, fresh, dirs_exist_ok=True)
        files.write_json(fresh / _RECORD, record)
        best = Evaluation(**record["best"])
        export.write_card(fresh, best, trained[0], origin, rounds=trained[1:])
