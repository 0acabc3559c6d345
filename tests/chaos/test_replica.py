"""A replica whose engine dies, or does not start: what it counts, and when it gives up."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from journeyman import corpus, steps
from journeyman.errors import ModelError
from journeyman.labels.attempts import Note
from journeyman.labels.replica import Work
from journeyman.labels.store import LabelStore
from tests.chaos.conftest import SHARDS
from tests.chaos.labeling import StandIn, replica_here


class Failing(StandIn):
    """Does not start the first ``failures`` times; ``alive_at_once``: but runs all the same."""

    failures = starts = 0
    alive_at_once = False

    async def start(self) -> None:
        type(self).starts += 1
        if self.starts > self.failures:
            await super().start()
        else:
            raise ModelError("vLLM did not start")

    @property
    def alive(self) -> bool:
        return self.alive_at_once or super().alive


def failing(n: int, **facts: Any) -> Any:
    return type("Engine", (Failing,), {"failures": n, **facts})


def test_an_engine_that_does_not_start_is_not_started_again_before_anything_is_labeled(
    run: steps.Run,
):
    """The settings are wrong, and the user waits."""
    engine = failing(1)
    with pytest.raises(ModelError):
        replica_here(run, engine)
    assert engine.starts == 1


def test_an_engine_that_does_not_start_is_started_again_where_others_have_worked(run: steps.Run):
    replica = replica_here(run)
    replica.label(Work(shard=SHARDS[0]))
    replica.close()
    engine = failing(2)
    replica_here(run, engine).close()
    assert engine.starts == 3
    with pytest.raises(ModelError):
        replica_here(run, failing(3))
    refused = failing(1, alive_at_once=True)
    with pytest.raises(ModelError):
        replica_here(run, refused)
    assert refused.starts == 1


class Killed(StandIn):
    """Its core process is killed in the middle of its work, once."""

    requests = 0

    async def record_target(self, *arguments: Any) -> Any:
        self.requests += 1
        if self.requests == 20:
            self._core.kill()
        return await super().record_target(*arguments)


def test_a_restart_counts_once_however_many_shards_were_in_work(run: steps.Run):
    replica = replica_here(run, Killed)
    with ThreadPoolExecutor(len(SHARDS)) as threads:
        commits = list(threads.map(lambda shard: replica.label(Work(shard=shard)), SHARDS))
    replica.close()
    assert sum(commit.engine_restarts for commit in commits) == 1
    assert sum(commit.ok for commit in commits) == 12 * len(SHARDS)


class Watched(StandIn):
    """Writes down whose rows were in it, and what its shard's note said then."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.inside: set[str] = set()
        self.seen: list[tuple[set[str], Any]] = []

    async def record_target(self, token_ids: list[int], *arguments: Any) -> Any:
        text = self.tokenizer.decode(token_ids)
        self.inside.add(text)
        self.seen.append((set(self.inside), self.store.read_attempts(SHARDS[0])))
        try:
            return await super().record_target(token_ids, *arguments)
        finally:
            self.inside.remove(text)


def test_a_shard_whose_replicas_died_runs_in_small_groups_with_no_others_beside(run: steps.Run):
    """And the note on disk names, at every moment, the rows that are in the engine."""
    store = LabelStore(run.labels)
    Watched.store = store
    replica = replica_here(run, Watched)
    store.write_attempts(SHARDS[0], Note(running=None, deaths=1).to_json())
    with ThreadPoolExecutor(len(SHARDS)) as threads:
        commits = list(threads.map(lambda shard: replica.label(Work(shard=shard)), SHARDS))
    seen = replica._backend.seen
    replica.close()
    assert sum(commit.ok for commit in commits) == 12 * len(SHARDS)
    rows = corpus.read_shard(run.path("prepare"), SHARDS[0]).to_pylist()
    texts = {row["text"]: row["id"] for row in rows}
    suspected = [(inside, note) for inside, note in seen if inside & set(texts)]
    assert {len(inside) for inside, _ in suspected} == {1, 2}  # of twelve, in eight parts at most
    for inside, note in suspected:
        assert inside <= set(texts)
        assert {texts[text] for text in inside} <= set(note["running"])
    for inside, note in seen:
        if not inside & set(texts) and note is not None:
            assert not note["running"]
    assert store.read_attempts(SHARDS[0]) is None
