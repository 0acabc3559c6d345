"""Which shards a labeling run has still to do: from the names of commits, never from rows; and how
many of them a replica is given at a time."""

from __future__ import annotations

from typing import Any

from journeyman.labels.store import LabelStore

# Ray Data's work is by block, a replica's by shard: large blocks spare the driver, but where there
# are few of them, most replicas wait in the end for those that have one more.
_BLOCKS, _ROUNDS, _LARGEST_BLOCK = 1000, 10, 20


def todo(corpus_manifest: dict[str, Any], store: LabelStore, generation: int = 0) -> list[str]:
    """Shards to label, in the corpus's order.

    Generation 0: those without a commit. A higher one requeues quarantined rows: also those whose
    last commit is of a lower generation and has rows in quarantine.
    """
    shards = [shard["name"] for shard in corpus_manifest["shards"]]
    if generation == 0:
        done = store.done()
        return [shard for shard in shards if shard not in done]
    commits = store.commits()
    return [
        shard
        for shard in shards
        if (commit := commits.get(shard)) is None
        or (commit.quarantined and commit.generation < generation)
    ]


def shards_per_block(n_shards: int, n_at_a_time: int) -> int:
    """n_at_a_time: shards that all replicas together work on."""
    n_blocks = max(_BLOCKS, _ROUNDS * n_at_a_time)
    return min(_LARGEST_BLOCK, max(1, n_shards // n_blocks))
