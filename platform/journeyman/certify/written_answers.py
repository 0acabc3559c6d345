"""What student and teacher write behind the held-out rows: label datasets like any other, made once
for a student and a question, and gone on with where a run was killed.

    RUN/answers/prompts/          the held-out rows, a corpus
    RUN/answers/labels/           what the student wrote, greedily
    RUN/answers/samples-5-at-0.7/ what it wrote when it was sampled, for its confidence
    RUN/answers/teacher/          what the teacher wrote, where its labels are of given texts
    RUN/answers/judge/            pairs of answers, a corpus, and the judge's verdicts on them
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import corpus, files
from journeyman.certify import consistency
from journeyman.certify.bundle import Samples
from journeyman.columns import n_characters
from journeyman.labels import dataset, pipeline
from journeyman.models import Model
from journeyman.recipe import Classes, Generate, Rationales, Recipe, Teacher, digest
from journeyman.student import round_corpus, writing
from journeyman.teacher.tasks import row_values

if TYPE_CHECKING:
    from journeyman.labels.progress import LabelProgress

PROMPTS, OF_STUDENT, OF_TEACHER, OF_JUDGE = "prompts", "labels", "teacher", "judge/labels"
_ALWAYS = ("calibrate", "certify")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The rows, and how they are asked about.

    Attributes:
        recipe: of the run.
        asked: of the student, for its greedy answer.
        splits: that are asked.
        folder: ``answers``, as above.
        on_progress: told how far it is.
    """

    recipe: Recipe
    asked: Generate
    splits: tuple[str, ...]
    folder: Path
    on_progress: Callable[[LabelProgress], None]

    @property
    def prompts(self) -> Path:
        return self.folder / PROMPTS

    def by_student(self, corpus_dir: str | Path, student: Model) -> Path:
        """The student's label dataset; of another student, or of other rows, it is set aside with
        all that was made beside it."""
        words = words_given(self.recipe)
        made_of = digest([corpus.read_manifest(corpus_dir)["digest"], student.weights_digest,
                          student.tokenizer_digest, self.asked.asked(),
                          *([] if words is None else [words]),
                          *([] if self.splits == _ALWAYS else [self.splits])])  # fmt: skip
        _keep_if(self.folder, made_of, "answers.json")
        if not (self.prompts / "manifest.json").exists():
            rows_per_shard = self.recipe.corpus.rows_per_shard
            round_corpus.write_splits(corpus_dir, self.prompts, self.splits, rows_per_shard, words)
        return self._labeled(self._of_student(student, self.asked), student, OF_STUDENT)

    def sampled(self, student: Model, samples: Samples) -> Path:
        """The dataset of its samples."""
        asked = consistency.question(self.asked, samples)
        return self._labeled(self._of_student(student, asked), student, of_samples(samples))

    def by_teacher(self, teacher: Model, question: Generate | Rationales) -> Path:
        """The teacher's own words behind the same prompts."""
        asked = self.recipe.model_copy(update={"labels": question, "ensemble": {}})
        return self._labeled(asked, teacher, OF_TEACHER)

    def judged(
        self, asked: Classes, settings: Teacher, judge: Model, rows: Sequence[dict[str, Any]]
    ) -> Path:
        """The dataset of a judge's verdicts on the pairs of these corpus rows; settings: its."""
        folder = self.folder / "judge"
        made_of = digest([judge.weights_digest, asked.asked(), list(rows)])
        _keep_if(folder, made_of, "judge.json")
        if not (folder / "pairs" / "manifest.json").exists():
            round_corpus.write_rows(folder / "pairs", rows, self.recipe.corpus.rows_per_shard)
        changes = {"labels": asked, "teacher": settings, "ensemble": {}}
        by_judge = self.recipe.model_copy(update=changes)
        return self._labeled(by_judge, judge, OF_JUDGE, folder / "pairs")

    def longest(self, ids: Sequence[str], columns: Sequence[str]) -> int:
        """Characters of the longest of these rows, as they are asked about."""
        lengths, among = [0], set(ids)
        for shard in corpus.read_manifest(self.prompts)["shards"]:
            table = corpus.read_shard(self.prompts, shard["name"]).select(["id", "text", "meta"])
            for row in table.to_pylist():
                if row["id"] in among:
                    values = row_values(row["text"], json.loads(row["meta"] or "{}"))
                    lengths.append(n_characters(values, columns))
        return max(lengths)

    def _of_student(self, student: Model, asked: Generate | Rationales) -> Recipe:
        return writing.written_by(self.recipe, student.path, asked)

    def _labeled(self, asked: Recipe, model: Model, name: str, rows: Path | None = None) -> Path:
        """rows: another corpus than the prompts."""
        labels = self.folder / name
        if not dataset.is_finished(labels):
            pipeline.label(asked, model, rows or self.prompts, labels, self.on_progress)
        return labels


def _keep_if(folder: Path, made_of: str, name: str) -> None:
    """Set the folder aside unless it is of these inputs."""
    record = folder / name
    if not record.exists() or files.read_json(record).get("inputs") != made_of:
        files.set_aside(folder)
        files.write_json(record, {"inputs": made_of})


def of_samples(samples: Samples) -> str:
    """Name of their dataset."""
    return f"samples-{samples.n}-at-{samples.temperature!r}"


def held_out_splits(corpus_dir: str | Path) -> tuple[str, ...]:
    has_test = corpus.read_manifest(corpus_dir)["splits"].get("test")
    return (*_ALWAYS, "test") if has_test else _ALWAYS


def words_given(recipe: Recipe) -> int | None:
    """That are given of a held-out text; None: all, which requests to a cascade are, too."""
    complete = recipe.certify.complete
    return None if complete is None or recipe.corpus.feedback else complete.words
