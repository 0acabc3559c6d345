"""A replica that outlives its run, as it may by some seconds, harms nothing by what it writes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from journeyman import recipe, steps
from journeyman.errors import DataError
from journeyman.labels.replica import Work
from journeyman.labels.store import LabelStore
from tests.chaos.labeling import nothing_but_a_name, replica_here

N_SHARDS = 5


@pytest.fixture
def run(tmp_path: Path) -> steps.Run:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(60)))
    run = steps.Run(
        recipe.parse(
            {
                "name": "run",
                "output": str(tmp_path),
                "corpus": {
                    "sources": [str(source)],
                    "shares": {"train": 1},
                    "rows_per_shard": 60 // N_SHARDS,
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


def files(run: steps.Run, folder: str) -> list[str]:
    return sorted(f"{folder}/{path.name}" for path in (Path(run.labels) / folder).glob("*"))


def test_of_two_replicas_that_label_the_same_shards_one_commits_each(run: steps.Run):
    work = [Work(shard=f"part-{i:05d}.parquet") for i in range(N_SHARDS)]
    replicas = [replica_here(run), replica_here(run)]
    with ThreadPoolExecutor(2 * N_SHARDS) as threads:
        told = [threads.submit(replica.label, one) for one in work for replica in replicas]
    for replica in replicas:
        replica.close()
    commits = list(LabelStore(run.labels).commits().values())
    assert [future.result() for future in told] == [c for c in commits for _ in replicas]
    assert files(run, "shards") == sorted(commit.data for commit in commits)
    assert files(run, "attempts") == []


def test_a_replica_whose_dataset_was_set_aside_writes_nothing_into_the_new_one(run: steps.Run):
    orphan = replica_here(run)
    orphan.label(Work(shard="part-00000.parquet"))
    run._set_labels_aside()
    other = steps.Run(run.recipe.model_copy(
        update={"labels": run.recipe.labels.model_copy(update={"context": "Q: "})}
    ))  # fmt: skip
    new = replica_here(other)
    with pytest.raises(DataError, match="another dataset"):
        orphan.label(Work(shard="part-00001.parquet"))
    assert files(run, "shards") == files(run, "commits") == []
    commit = new.label(Work(shard="part-00001.parquet"))
    assert files(run, "shards") == [commit.data]
    for replica in (orphan, new):
        replica.close()
