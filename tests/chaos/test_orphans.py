"""A replica that outlives its run, as it may by some seconds, harms nothing by what it writes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from journeyman import steps
from journeyman.errors import DataError
from journeyman.labels.replica import Work
from journeyman.labels.store import LabelStore
from tests.chaos.conftest import SHARDS
from tests.chaos.labeling import replica_here


def files(run: steps.Run, folder: str) -> list[str]:
    return sorted(f"{folder}/{path.name}" for path in (Path(run.labels) / folder).glob("*"))


def test_of_two_replicas_that_label_the_same_shards_one_commits_each(run: steps.Run):
    replicas = [replica_here(run), replica_here(run)]
    work = [Work(shard=shard) for shard in SHARDS]
    with ThreadPoolExecutor(2 * len(SHARDS)) as threads:
        told = [threads.submit(replica.label, one) for one in work for replica in replicas]
    for replica in replicas:
        replica.close()
    commits = list(LabelStore(run.labels).commits().values())
    assert [future.result() for future in told] == [c for c in commits for _ in replicas]
    assert files(run, "shards") == sorted(commit.data for commit in commits)
    assert files(run, "attempts") == []


def test_a_replica_whose_dataset_was_set_aside_writes_nothing_into_the_new_one(run: steps.Run):
    orphan = replica_here(run)
    orphan.label(Work(shard=SHARDS[0]))
    run._set_labels_aside()
    other = steps.Run(run.recipe.model_copy(
        update={"labels": run.recipe.labels.model_copy(update={"context": "Q: "})}
    ))  # fmt: skip
    new = replica_here(other)
    with pytest.raises(DataError, match="another dataset"):
        orphan.label(Work(shard=SHARDS[1]))
    assert files(run, "shards") == files(run, "commits") == []
    commit = new.label(Work(shard=SHARDS[1]))
    assert files(run, "shards") == [commit.data]
    for replica in (orphan, new):
        replica.close()
