"""The end of a labeling run: every row accounted for, and the manifest that says so."""

from __future__ import annotations

from typing import Any

import numpy as np

from journeyman.errors import DataError
from journeyman.labels import card, cost, dataset, prior, quality
from journeyman.labels.schema import Commit
from journeyman.labels.store import LabelStore
from journeyman.recipe import Classes, Recipe, Teacher, digest
from journeyman.teacher import engine

_SUMMED = (
    "rows", "ok", "quarantined", "filtered", "truncated", "copied", "prompt_tokens",
    "cached_tokens", "output_tokens", "replica_seconds", "bytes", "engine_restarts",
)  # fmt: skip


def finish(
    store: LabelStore,
    recipe: Recipe,
    teacher: Teacher,
    corpus_manifest: dict[str, Any],
) -> dict[str, Any]:
    """Check that every row is accounted for; fit the prior, filter, and complete the manifest.

    Raises DataError where counts do not add up, or where no row was labeled.
    """
    commits = store.compact()  # each commit is read once: what comes below reads one file
    for shard in corpus_manifest["shards"]:
        _check(commits.get(shard["name"]), shard, store)
    ordered = [commits[s["name"]] for s in corpus_manifest["shards"]]
    totals = {name: sum(getattr(commit, name) for commit in ordered) for name in _SUMMED}
    if not totals["ok"]:
        raise DataError(
            f"{store.where}: all {totals['rows']} rows are in quarantine or left out; the first "
            f"reason: {_first_reason(store, ordered)}"
        )
    store.finish(
        {
            "complete": True,
            "recipe": recipe.hash,
            "teacher_column": teacher.column,  # of the corpus, where nobody was asked
            "versions": {"vllm": None if teacher.gives_text_alone else engine.version()},
            "shards": [s["name"] for s in corpus_manifest["shards"]],
            "splits": corpus_manifest["splits"],
            "totals": totals,
            "log_prior": None,
            "filtered": None,
            "cost": cost.facts(teacher.price, totals),
            "digest": digest([commit.sha256 for commit in ordered]),
        }
    )
    del commits, ordered  # of a million shards some gigabytes
    return complete(store, recipe)


def complete(store: LabelStore, recipe: Recipe) -> dict[str, Any]:
    """The steps over a dataset that is labeled: they ask the teacher nothing."""
    labels, manifest = recipe.labels, store.manifest()
    # An ensemble's teachers had their priors corrected one by one.
    corrected = manifest["log_prior"] is not None or "members" in manifest["identity"]
    if isinstance(labels, Classes) and labels.prior_correction == "batch" and not corrected:
        store.finish({"log_prior": _log_prior(store, labels)})
    manifest = store.finish(quality.apply(store, store.manifest(), recipe))
    store.remove_orphans()
    card.write(store, manifest["splits"])
    return manifest


def _log_prior(store: LabelStore, labels: Classes) -> list[float]:
    import pyarrow.compute as pc

    parts = []
    for table in dataset.tables(store.where, filtered=True):
        train = table.filter(pc.equal(table["split"], "train"))["class_logprobs"]
        if len(train):
            parts.append(train.combine_chunks().flatten().to_numpy().reshape(len(train), -1))
    if not parts:
        raise DataError(
            f"{store.where}: no train rows to fit the prior on; set "
            "labels.prior_correction: none, or give corpus.splits some train rows."
        )
    rows = np.concatenate(parts)
    known = labels.class_shares
    shares = None if known is None else np.array([known[label] for label in labels.classes])
    return [float(v) for v in prior.fit_log_prior(rows, shares)]


def _check(commit: Commit | None, shard: dict[str, Any], store: LabelStore) -> None:
    if commit is None:
        raise DataError(f"{store.where}: {shard['name']} has no commit; run the command again.")
    accounted = commit.ok + commit.quarantined + commit.filtered
    if not commit.rows == accounted == shard["rows"]:
        raise DataError(
            f"{store.where}: {shard['name']} has {shard['rows']} rows, but its commit accounts "
            f"for {accounted} of {commit.rows}; remove the commit and label again."
        )


def _first_reason(store: LabelStore, commits: list[Commit]) -> str:
    for commit in commits:
        for row in store.read_quarantine(commit):
            return f"{row.error_class}: {row.message}"
    return "they were left out by labels.overflow: skip."
