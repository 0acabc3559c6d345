"""A small prepared run whose replicas need no engine."""

import json
from pathlib import Path

import pytest

from journeyman import recipe, steps
from tests.chaos.labeling import nothing_but_a_name

SHARDS = [f"part-{i:05d}.parquet" for i in range(5)]


@pytest.fixture
def run(tmp_path: Path) -> steps.Run:
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(12 * len(SHARDS)))
    )
    run = steps.Run(
        recipe.parse(
            {
                "name": "run",
                "output": str(tmp_path),
                "corpus": {
                    "sources": [str(source)],
                    "shares": {"train": 1},
                    "rows_per_shard": 12,
                },
                "teacher": {
                    "model": nothing_but_a_name(tmp_path / "model"),
                    "max_model_len": 64,
                    "engine_args": {"row_s": 0.002, "start_s": 0},
                },
                "labels": {"kind": "logits", "k": 4},
            }
        )
    )
    run.execute("prepare")
    return run
