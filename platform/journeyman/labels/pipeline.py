"""The labeling run: corpus shards through an actor pool of replicas, by Ray Data.

Only shard names and commit records travel through Ray; labels are written where they are made.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from journeyman import corpus
from journeyman.cluster import quiet_ray_data, reason_of
from journeyman.errors import ClusterError, DataError, JourneymanError
from journeyman.labels import dataset, prior
from journeyman.labels.replica import Counts, Replica, ReplicaSpec
from journeyman.labels.schema import Commit
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Recipe, digest
from journeyman.teacher import engine, tasks

_POLL_S = 0.5
_RATE_WINDOW_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelProgress:
    """Where a labeling run stands; rates are those of the last half minute."""

    rows: int
    rows_done: int
    rows_per_s: float
    tokens_per_s: float
    quarantined: int
    eta_s: float | None


def identity(recipe: Recipe, model: Model, corpus_digest: str) -> dict[str, Any]:
    """What a dataset's labels depend on; a dataset takes only labels of one identity."""
    labels = recipe.labels
    return {
        "kind": labels.kind,
        "scoring": labels.scoring,
        "classes": list(labels.classes),
        "prompt": tasks.prompt_digest(labels),
        "prior_correction": labels.prior_correction,
        "teacher": model.identity,
        "dtype": recipe.teacher.dtype,
        "corpus": corpus_digest,
    }


def label(
    recipe: Recipe,
    model: Model,
    corpus_dir: Path,
    labels_dir: Path,
    on_progress: Callable[[LabelProgress], None] = lambda _: None,
) -> dict[str, Any]:
    """Label every corpus shard that has no commit yet; returns the dataset's manifest.

    Ray must be initialised. Raises DataError (another identity, counts that do not add up),
    ModelError (the engine does not start), ClusterError (a full disk, lost replicas).
    """
    manifest = corpus.read_manifest(corpus_dir)
    store = LabelStore(labels_dir)
    store.open(identity(recipe, model, manifest["digest"]))
    done = store.commits()
    todo = [s["name"] for s in manifest["shards"] if s["name"] not in done]
    if todo:
        spec = ReplicaSpec(
            recipe=recipe,
            model=model,
            corpus_dir=corpus_dir.resolve(),
            labels_dir=labels_dir.resolve(),
        )
        before = sum(commit.rows for commit in done.values())
        _run(spec, todo, _Meter(manifest["rows"], before, on_progress))
    return _finish(store, recipe, manifest)


class _Meter:
    """Turns replicas' counts into progress; rates are those of the last half minute."""

    def __init__(
        self, rows: int, rows_before: int, on_progress: Callable[[LabelProgress], None]
    ) -> None:
        self._rows, self._before, self._on_progress = rows, rows_before, on_progress
        self._seen: deque[tuple[float, int, int]] = deque()  # time, rows, tokens

    def show(self, counts: Counts) -> None:
        now, tokens = time.monotonic(), counts.prompt_tokens + counts.output_tokens
        if counts.rows:  # engines have started
            self._seen.append((now, counts.rows, tokens))
        while self._seen and now - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        then, rows_then, tokens_then = self._seen[0] if self._seen else (now, 0, 0)
        elapsed = max(now - then, 1.0)
        rows_per_s = (counts.rows - rows_then) / elapsed
        left = self._rows - self._before - counts.rows
        self._on_progress(
            LabelProgress(
                rows=self._rows,
                rows_done=self._before + counts.rows,
                rows_per_s=rows_per_s,
                tokens_per_s=(tokens - tokens_then) / elapsed,
                quarantined=counts.quarantined,
                eta_s=left / rows_per_s if rows_per_s else None,
            )
        )


class _ShardLabeler:
    """The Ray Data UDF: a replica in an actor; one shard name in, one commit record out."""

    def __init__(self, spec: ReplicaSpec, counter: Any) -> None:
        self._replica = Replica(spec, lambda counts: counter.add.remote(counts))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """An error of ours comes back as a value: Ray Data would wrap it, and try again."""
        try:
            commits = [self._replica.label(str(shard)) for shard in batch["shard"]]
        except JourneymanError as error:
            return {"commit": [""], "error": [str(error)]}
        records = [json.dumps(dataclasses.asdict(commit)) for commit in commits]
        return {"commit": records, "error": [""] * len(records)}


class _Counter:
    """The named actor that replicas push their counts to."""

    def __init__(self) -> None:
        self._total = Counts()

    def add(self, more: Counts) -> None:
        sums = {n: getattr(self._total, n) + getattr(more, n) for n in Counts.__slots__}
        self._total = Counts(**sums)

    def total(self) -> Counts:
        return self._total


def _run(spec: ReplicaSpec, shards: list[str], meter: _Meter) -> None:
    import threading

    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Ray Data gives up after half an hour without progress, waiting for GPU nodes included.
    context.execution_no_progress_timeout_s = -1
    recipe = spec.recipe
    in_flight = recipe.labels.shards_in_flight
    replicas = recipe.cluster.replicas
    counter = ray.remote(num_cpus=0)(_Counter).remote()
    dataset_ = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    ).map_batches(
        _ShardLabeler,
        fn_constructor_args=(spec, counter),
        batch_size=1,
        batch_format="numpy",
        num_cpus=recipe.cluster.cpus_per_replica,
        num_gpus=recipe.cluster.gpus_per_replica or None,
        compute=ActorPoolStrategy(
            min_size=replicas.min,
            max_size=replicas.max,
            initial_size=min(replicas.max, max(replicas.min, len(shards) // (2 * in_flight))),
            max_concurrent_calls_per_actor=in_flight,
            # The pool grows from a utilisation of 1.75 on: tasks in flight over concurrent calls.
            max_tasks_in_flight_per_actor=2 * in_flight,
            enable_true_multi_threading=True,
        ),
    )
    quiet_ray_data()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            meter.show(ray.get(counter.total.remote()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        for record in dataset_.iter_rows():
            # The commit files are what counts; they are read again at the end.
            if record["error"]:
                raise ClusterError(record["error"])
        meter.show(ray.get(counter.total.remote()))
    except ray.exceptions.RayError as error:
        raise reason_of(error, "labeling") from error
    finally:
        stop.set()
        watcher.join(timeout=2 * _POLL_S)


def _finish(store: LabelStore, recipe: Recipe, corpus_manifest: dict[str, Any]) -> dict[str, Any]:
    """Check that every row is accounted for, fit the prior, and complete the manifest."""
    commits = store.commits()
    for shard in corpus_manifest["shards"]:
        commit = commits.get(shard["name"])
        _check(commit, shard, store)
    ordered = [commits[s["name"]] for s in corpus_manifest["shards"]]
    totals = {
        name: sum(getattr(commit, name) for commit in ordered)
        for name in ("rows", "ok", "quarantined", "filtered", "prompt_tokens", "output_tokens",
                     "bytes", "engine_restarts")
    }  # fmt: skip
    if not totals["ok"]:
        raise DataError(
            f"{store.directory}: all {totals['rows']} rows are in quarantine; the first reason: "
            f"{_first_reason(store, ordered)}"
        )
    facts = {
        "complete": True,
        "recipe": recipe.hash,
        "versions": {"vllm": engine.version()},
        "shards": [s["name"] for s in corpus_manifest["shards"]],
        "totals": totals,
        "log_prior": None,
        "digest": digest([commit.sha256 for commit in ordered]),
    }
    manifest = store.finish(facts)
    if recipe.labels.prior_correction == "batch":
        manifest = store.finish({"log_prior": _log_prior(store)})
    return manifest


def _log_prior(store: LabelStore) -> list[float]:
    import pyarrow.compute as pc

    table = dataset.read(store.directory)
    train = table.filter(pc.equal(table["split"], "train"))
    if not len(train):
        raise DataError(
            f"{store.directory}: no train rows to fit the prior on; set "
            "labels.prior_correction: none, or give corpus.splits some train rows."
        )
    rows = np.array(train["class_logprobs"].to_pylist())
    return [float(v) for v in prior.fit_log_prior(rows)]


def _check(commit: Commit | None, shard: dict[str, Any], store: LabelStore) -> None:
    if commit is None:
        raise DataError(f"{store.directory}: {shard['name']} has no commit; run the command again.")
    accounted = commit.ok + commit.quarantined + commit.filtered
    if not commit.rows == accounted == shard["rows"]:
        raise DataError(
            f"{store.directory}: {shard['name']} has {shard['rows']} rows, but its commit accounts "
            f"for {accounted} of {commit.rows}; remove the commit and label again."
        )


def _first_reason(store: LabelStore, commits: list[Commit]) -> str:
    import pyarrow.parquet as pq

    path = next(commit.quarantine for commit in commits if commit.quarantine)
    row = pq.read_table(store.directory / path).slice(0, 1).to_pylist()[0]
    return f"{row['error_class']}: {row['message']}"
