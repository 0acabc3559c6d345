"""Step by step on solutions that people wrote, as the command does it: no engine, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from journeyman import recipe, steps
from journeyman.labels import dataset
from tests.conftest import ROOT, journeyman

RECIPE = ROOT / "jobs" / "recipes" / "rationales.yaml"
SMALL = (
    "corpus.limits={train: 32, calibrate: 12}",
    "student.layers=2",
    "student.max_length=128",
    "training.workers=1",
)


@pytest.mark.slow
def test_reasonings_and_answers_alone_stand_side_by_side(tmp_path: Path) -> None:
    small = [part for one in (*SMALL, f"output={tmp_path}") for part in ("--set", one)]
    both = journeyman("run", str(RECIPE), *small)
    assert both.returncode == 0, both.stderr
    assert "answers that it writes to the letter" in both.stdout
    folder = tmp_path / "rationales"
    table = dataset.read(folder / "labels").to_pylist()
    assert len(table) == 44
    for row in table:  # the answer that is parsed is the one that the source has
        assert row["answer"] == row["gold"] and row["reasoning"].rstrip().endswith(row["gold"])
    done = steps.Run(recipe.load(RECIPE, [*SMALL, f"output={tmp_path}"]))
    assert all(done.execute(name).seconds is None for name in ("prepare", "label", "train"))

    alone = journeyman(
        "run", str(RECIPE), *small, "--set", "name=answers", "--set", "training.rationale_weight=0"
    )
    assert alone.returncode == 0, alone.stderr
    records = [json.loads((tmp_path / name / "student" / "journeyman.json").read_text())
               for name in ("rationales", "answers")]  # fmt: skip
    assert [record["rows"] for record in records] == [32, 32]
    assert [record["best"]["n_rows"] for record in records] == [12, 12]
    compared = journeyman("compare", str(folder), str(tmp_path / "answers"))
    assert compared.returncode == 0 and "exact" in compared.stdout
    assert "learned from different labels" not in compared.stdout
