"""What the tables of finished runs are made of, whatever their students do."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from journeyman import corpus, files
from journeyman.certify.bundle import Guarantee
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.recipe import Recipe
from journeyman.report.verdict import percent
from journeyman.run_folder import RunFolder, folder_of

NOTHING = "–"


def run_folder_of(recorded: Recipe, run_dir: Path) -> RunFolder:
    """Of a run that may have been moved."""
    if recorded.run_url is None and recorded.run_dir.resolve() != run_dir.resolve():
        where = {"output": str(run_dir.resolve().parent), "name": run_dir.resolve().name}
        recorded = recorded.model_copy(update=where)
    return RunFolder(recorded, run_dir)


def proved(guarantee: Guarantee) -> str:
    said = f"{guarantee.kind.replace('_', ' ')} at {percent(guarantee.alpha)}"
    what = f"proved {guarantee.upper_bound:.1%} on {guarantee.n:,} certify rows"
    reason = what if guarantee.feasible else f"no threshold meets it: {guarantee.reason}"
    return f"{said}, confidence {percent(1 - guarantee.delta)}; {reason}"


def seconds_of(run_dir: Path, corpus_dir: str | Path, labels: str | Path) -> dict[str, float]:
    """Of each step whose folder is there, as its manifest says."""
    found: dict[str, float] = {}
    with contextlib.suppress(DataError):
        found["prepare"] = corpus.read_manifest(corpus_dir)["seconds"]
    if dataset.is_finished(labels):
        found["label"] = LabelStore(labels).manifest()["seconds"]
    later = (("train", "train", "journeyman.json"), ("certify", "certify", "manifest.json"),
             ("serve and measure", "measure", "manifest.json"))  # fmt: skip
    for name, step, manifest in later:
        if (path := folder_of(run_dir, step) / manifest).is_file():
            found[name] = files.read_json(path)["seconds"]
    return found


def percent_of(count: int, n: int) -> str:
    return f"{count / n:.1%}" if n else NOTHING


def promised(guarantee: Guarantee) -> str:
    return f"≤ {percent(guarantee.alpha)}" if guarantee.feasible else "escalates everything"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
