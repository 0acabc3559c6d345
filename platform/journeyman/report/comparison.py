"""Finished students side by side: what each run's folder says of its student.

``journeyman compare --report`` leaves them as ``comparison.json`` in each run's folder, or behind
its URL, where the page of that run finds them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import files
from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.student.learner import AGREES_WITH, Against

_KEPT = "comparison.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedStudent:
    """A student's own record; measured on calibrate rows, at the checkpoint that was exported."""

    name: str
    size_bytes: int  # of the weights
    agreement: float
    kl: float | None  # nats a row, of language models a token
    gold_accuracy: float | None
    perplexity: float | None
    # Calibrate rows a second, at that evaluation, on the device that it was trained on.
    rows_per_s: float | None
    n_rows: int  # train rows
    steps: int
    seconds: float  # of training
    labels_digest: str
    exact_match: float | None = None  # texts that a language model writes to the letter
    cross_entropy: float | None = None  # nats a token, where KL cannot be known
    against: Against = "distributions"  # what ``agreement`` is with
    n_held_out: int | None = None  # calibrate rows
    hardware: Mapping[str, Any] | None = None  # as ``cluster.hardware`` has it


def read(run: Path) -> ComparedStudent:
    """The student in a run's folder, or in the folder itself; raises DataError if there is none."""
    for folder in (run / "student", run):
        if (folder / "journeyman.json").is_file():
            record = files.read_json(folder / "journeyman.json")
            if record.get("kind") == "student":
                return _student(run.resolve().name, folder, record)
    raise DataError(f"{run}: no finished student here; run journeyman train first.")


def _student(name: str, folder: Path, record: dict[str, Any]) -> ComparedStudent:
    best = _named(record["best"])
    speeds = (
        line.get("rows_per_s")
        for line in files.read_json_lines(folder / "training.jsonl")
        if line["kind"] == "evaluation" and line["step"] == best["step"]
    )
    return ComparedStudent(
        name=name,
        size_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        agreement=best["agreement"],
        kl=best.get("kl"),
        gold_accuracy=best.get("gold_accuracy"),
        perplexity=best.get("perplexity"),
        rows_per_s=next(speeds, None),
        n_rows=record["rows"],
        steps=record["steps"],
        seconds=record["seconds"],
        labels_digest=record["labels"],
        exact_match=best.get("exact_match"),
        cross_entropy=best.get("cross_entropy"),
        against=best.get("against", "distributions"),
        n_held_out=best["n_rows"],
        hardware=record.get("hardware"),
    )


def _named(best: dict[str, Any]) -> dict[str, Any]:
    """An evaluation by what it was of: records did not say it at first, and called KL what was the
    cross-entropy of a text's own tokens, the logarithm of its perplexity."""
    kl, perplexity = best.get("kl"), best.get("perplexity")
    if "against" in best or kl is None or perplexity is None:
        return best
    if not math.isclose(kl, math.log(perplexity), rel_tol=1e-6):
        return best
    return best | {"against": "text", "kl": None, "cross_entropy": kl}


def agreement_notes(students: Sequence[ComparedStudent]) -> list[str]:
    """A sentence for each way in which agreement is not with the teacher's first choice."""
    notes = []
    for against, with_what in AGREES_WITH.items():
        named = ", ".join(one.name for one in students if one.against == against)
        if named and against != "distributions":
            notes.append(f"Agreement of {named} is with {with_what}.")
    return notes


def keep(students: Sequence[ComparedStudent], run: str | Path) -> None:
    """Leave the comparison in a run's folder. run: the folder, or its URL. Raises ClusterError."""
    compared = [dataclasses.asdict(student) for student in students]
    Folder(run).put(_KEPT, json.dumps(compared, indent=2, ensure_ascii=False).encode())


def kept(run: str | Path) -> tuple[ComparedStudent, ...]:
    """What ``keep`` left there; empty where it left nothing. Raises DataError, ClusterError."""
    folder = Folder(run)
    try:
        return tuple(ComparedStudent(**values) for values in json.loads(folder.get(_KEPT)))
    except FileNotFoundError:
        return ()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{folder.path(_KEPT)}: damaged, or not a comparison of this version; remove it, or "
            "run journeyman compare --report again."
        ) from error
