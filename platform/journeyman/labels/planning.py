"""Which shards a labeling run has still to do: from the names of commits, never from rows."""

from __future__ import annotations

from typing import Any

from journeyman.labels.store import LabelStore


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
