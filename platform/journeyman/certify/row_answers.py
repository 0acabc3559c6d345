"""What student and teacher say of each held-out row, read from their label datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.recipe import Generate, Rationales

_NONE = np.empty((0, 1))  # log-probabilities of no answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAnswers:
    """Of one row.

    Attributes:
        student: None where it has no answer.
        logprobs: float[t], of the tokens of that; none then.
        teacher: its answer; teacher_logprob: of that, None where it is not known.
        samples: the answers of the teacher's samples, None where one could not be parsed; empty
            where it gave one answer.
        agreement: share of those that are its answer, None without.
    """

    id: str
    gold: str | None
    student: str | None
    logprobs: npt.NDArray[np.floating[Any]]
    teacher: str
    teacher_logprob: float | None
    samples: tuple[str | None, ...]
    agreement: float | None


def row_answers(
    question: Generate | Rationales, labels: str | Path, answers: Path, split: str
) -> list[RowAnswers]:
    """Of the rows of a split that the teacher answered.

    question: that labels (the teacher's dataset) answer; answers: the student's dataset.
    """
    written = {row["id"]: row for row in rows_of(answers, split) if row["n_positions"]}
    codec = dataset.codec_of(dataset.finished_manifest(LabelStore(answers)))
    assert codec is not None  # of kind generate
    said = "output" if isinstance(question, Generate) else "answer"
    found = []
    for row in rows_of(labels, split):
        own = written.get(row["id"])
        logprobs = codec.decode(own["logprobs"], own["n_positions"]).logprobs if own else _NONE
        samples = tuple(row.get("answers") or ())
        found.append(
            RowAnswers(
                id=row["id"],
                gold=row["gold"],
                student=own["output"] if own else None,
                logprobs=logprobs[:, 0],
                teacher=row[said],
                teacher_logprob=row.get("output_logprob"),
                samples=samples if len(samples) > 1 else (),
                agreement=row["agreement"] if len(samples) > 1 else None,
            )
        )
    return found


def rows_of(labels: str | Path, split: str) -> list[dict[str, Any]]:
    """The records of a split of a label dataset."""
    import pyarrow.compute as pc

    table = dataset.read(labels)
    rows: list[dict[str, Any]] = table.filter(pc.equal(table["split"], split)).to_pylist()
    return rows
