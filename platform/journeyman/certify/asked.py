"""The students that a cascade asks, and where those before a run's own come from: the folders of
their runs, checked to have learned the same corpus, teacher and classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from journeyman import files, models, run_folder
from journeyman.certify import spending
from journeyman.certify.ledger import Ledger
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore, differences, in_order
from journeyman.models import Model
from journeyman.prompts import Prompt
from journeyman.recipe import Recipe, Student
from journeyman.student.inputs import Input


class StudentScorer(Protocol):
    """What certification needs of a student: see ``student.models.Classifier``."""

    def logits(self, texts: Sequence[Input], batch_size: int = 32) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedStudent:
    """A student, and how it is asked.

    reads: its templates; ledger: what its own run has spent of certify rows.
    """

    model: Model
    scorer: StudentScorer
    reads: Student
    ledger: Ledger = field(default_factory=Ledger)


def before(
    recipe: Recipe, labels: dict[str, Any], columns: Sequence[str], own: Model
) -> tuple[AskedStudent, ...]:
    """The students of ``certify.before``; labels: the manifest of the run's own dataset; columns:
    that a request brings; own: the student that is asked last.

    Raises DataError where one is not there, or has learned something else; ClusterError.
    """
    found = tuple(_before(where, recipe, labels, columns) for where in recipe.certify.before)
    digests = [own.weights_digest, *(one.model.weights_digest for one in found)]
    for where, digest in zip(recipe.certify.before, digests[1:], strict=True):
        if digests.count(digest) > 1:
            raise DataError(
                f"certify.before: {where} has the same student as another of this cascade; name "
                "each but once, and not the run's own."
            )
    return found


def _before(
    where: str, recipe: Recipe, labels: dict[str, Any], columns: Sequence[str]
) -> AskedStudent:
    from journeyman.student.models import Classifier

    run = run_folder.here(where)
    record_path = run / "student" / "journeyman.json"
    if not record_path.is_file():
        raise DataError(
            f"certify.before: {where} has no finished student; run journeyman train there first."
        )
    record = files.read_json(record_path)
    _check_learned_the_same(where, record["labels"], labels)
    reads = _reads(where, run, record, recipe)
    for name, source in reads.templates().items():
        if unknown := Prompt(source, name).variables - set(columns):
            raise DataError(
                f"certify.before: the student of {where} reads the column {min(unknown)}, which no "
                "template of this recipe names, so that no request would bring it; take another."
            )
    return AskedStudent(
        model=models.resolve(str(run / "student")),
        scorer=Classifier.load(run / "student"),
        reads=reads,
        ledger=spending.of_bundle(run / "bundle"),
    )


def _reads(where: str, run: Path, record: dict[str, Any], recipe: Recipe) -> Student:
    """The recipe's student section with the templates of that run's."""
    templates = record.get("reads")
    if templates is None:  # a student from before they were kept beside it
        try:
            student = files.read_json(run / "bundle" / "recipe.json")["student"]
        except DataError as error:
            raise DataError(
                f"certify.before: nothing says what the student of {where} reads; run journeyman "
                "certify there first."
            ) from error
        templates = {name: student[name] for name in ("text", "text_pair")}
    return recipe.learner().model_copy(update=templates)


def _check_learned_the_same(where: str, learned: str, labels: dict[str, Any]) -> None:
    """Raises DataError. learned: digest of the dataset that the other student is of. One that
    labeled the same corpus by itself, in the same way, will do as well."""
    if learned == labels["digest"]:
        return
    try:
        other = dataset.finished_manifest(LabelStore(f"{where.rstrip('/')}/labels"))
    except DataError:
        other = None
    if other is None or other["digest"] != learned:
        raise DataError(
            f"certify.before: the student of {where} has learned other labels than this run's, and "
            "they are not in its folder to be compared; train it on these (labels.destination)."
        )
    there, here = in_order(other["identity"]), in_order(labels["identity"])
    changes = list(differences(there, here))
    if not changes:
        return
    for name, words in (("corpus", "another corpus"), ("teacher", "another teacher")):
        if there[name] != here[name]:
            change = next(one for one in changes if one.startswith(name))
            raise DataError(
                f"certify.before: the student of {where} has learned {words} ({change}); a cascade "
                "makes one promise about one of them: train it on this run's labels."
            )
    what = "other classes" if any(c.startswith("labels.classes") for c in changes) else (
        "labels made in another way"
    )  # fmt: skip
    raise DataError(
        f"certify.before: the student of {where} has learned {what} ({changes[0]}); train it on "
        "this run's labels."
    )
