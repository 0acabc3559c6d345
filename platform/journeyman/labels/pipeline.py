"""The labeling run: corpus shards through an actor pool of replicas, by Ray Data.

Only shard names and commit records travel through Ray; labels are written where they are made.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from journeyman import cluster, corpus, models, spot
from journeyman.cluster import quiet_ray_data, reason_of
from journeyman.errors import ClusterError, DataError, JourneymanError
from journeyman.folder import Folder
from journeyman.labels import ensemble, planning, resources, taught
from journeyman.labels.cache import Cache
from journeyman.labels.cost import Estimate, estimate
from journeyman.labels.finishing import finish
from journeyman.labels.progress import LabelProgress, Meter, Tally
from journeyman.labels.replica import Replica, ReplicaSpec, Trial, Work, codec_of
from journeyman.labels.schema import Commit
from journeyman.labels.store import LabelStore
from journeyman.logs import Log
from journeyman.models import Model
from journeyman.recipe import Classes, Recipe, Teacher
from journeyman.teacher import tasks

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_JUDGED = 200  # rows after which a run may be stopped for what it quarantines
_TRIED_SHARDS = 4
_LOGGED = ("rows", "ok", "quarantined", "filtered", "prompt_tokens", "output_tokens", "seconds",
           "engine_restarts")  # fmt: skip

OnProgress = Callable[[LabelProgress], None]


def identity(
    recipe: Recipe, model: Model, corpus_digest: str, teacher: Teacher | None = None
) -> dict[str, Any]:
    """What a dataset's labels depend on; a dataset takes only labels of one identity."""
    settings = teacher or recipe.teacher
    return {
        "kind": recipe.labels.kind,
        "labels": recipe.labels.asked(),
        "teacher": model.identity,
        "corpus": corpus_digest,
        **settings.decisive(recipe.labels.overflow),
    }


def label(
    recipe: Recipe,
    model: Model,
    corpus_dir: str | Path,
    labels: str | Path,
    on_progress: OnProgress = lambda _: None,
    *,
    teacher: Teacher | None = None,
    requeue: bool = False,
) -> dict[str, Any]:
    """Label every corpus shard that has no commit yet; returns the dataset's manifest.

    teacher: another one than the recipe's first (of an ensemble), whose model ``model`` is.
    requeue: label quarantined rows again; a run of it that was stopped is gone on with anyway.

    Ray must be initialised. Raises DataError (another identity, counts that do not add up, too
    many rows in quarantine), ModelError (the teacher does not start), ClusterError (a full disk,
    lost replicas).
    """
    teacher = teacher or recipe.teacher
    if teacher.url:
        tasks.check_remote(recipe.labels)
    manifest = corpus.read_manifest(corpus_dir)
    store = LabelStore(labels)
    store.open(identity(recipe, model, manifest["digest"], teacher))
    codec = codec_of(recipe.labels, model)
    store.finish({"codec": codec.describe() if codec else None})
    generation = _generation(store, requeue)
    todo = planning.todo(manifest, store, generation)
    if todo:
        spec = _taught(_spec(recipe, teacher, model, corpus_dir, store))
        before = store.commits() if generation else {}
        work = [Work(shard=s, generation=generation, before=before.get(s)) for s in todo]
        while work:
            given_back = _Run(spec, work, manifest, on_progress).run()
            work = [one for one in work if one.shard in given_back]
    return finish(store, recipe, teacher, manifest)


def label_ensemble(
    recipe: Recipe,
    model: Model,
    corpus_dir: str | Path,
    labels: str | Path,
    on_progress: OnProgress = lambda _: None,
) -> dict[str, Any]:
    """Label with each teacher, into a dataset of its own, and commit the mean of their
    distributions; returns that dataset's manifest. The dataset has been opened. Raises as
    ``label``."""
    store = LabelStore(labels)
    stores = []
    for name, teacher in members(recipe):
        own = model if name == "teacher" else models.teacher(teacher)
        stores.append(LabelStore(ensemble.member(store.where, name)))
        label(recipe, own, corpus_dir, stores[-1].where, on_progress, teacher=teacher)
    manifest = corpus.read_manifest(corpus_dir)
    codec = ensemble.codec_of([each.manifest()["codec"] for each in stores])
    store.finish({"codec": codec.describe() if codec else None})
    ensemble.combine(store, stores, [shard["name"] for shard in manifest["shards"]])
    return finish(store, recipe, recipe.teacher, manifest)


def estimated(
    recipe: Recipe, model: Model, corpus_dir: str | Path, labels: str | Path, n_rows: int
) -> Estimate:
    """What labeling the rows still to do will take, from trying a few; writes nothing."""
    import ray

    manifest = corpus.read_manifest(corpus_dir)
    store = LabelStore(labels)
    done = store.done()
    todo = [shard for shard in manifest["shards"] if shard["name"] not in done]
    if not todo:
        raise DataError(f"{store.where}: every row is labeled already; there is nothing to do.")
    spec = _spec(recipe, recipe.teacher, model, corpus_dir, store,
                 identity(recipe, model, manifest["digest"]))  # fmt: skip
    step = max(1, len(todo) // _TRIED_SHARDS)
    tried = [shard["name"] for shard in todo[::step][:_TRIED_SHARDS]]
    actor = ray.remote(_Trier).options(**resources.of_actor(recipe, recipe.teacher)).remote(spec)
    try:
        trials = ray.get(actor.run.remote(tried, -(-n_rows // len(tried))))
    except ray.exceptions.RayError as error:
        raise reason_of(error, "the estimate") from error
    finally:
        ray.kill(actor)
    rows = sum(shard["rows"] for shard in todo)
    return estimate(trials, rows, recipe.cluster.replicas.max, recipe.teacher.price)


class _Trier:
    """An actor with a replica that only tries rows."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._replica = Replica(spec, lambda *_: None)

    def run(self, shards: Sequence[str], n_rows: int) -> list[Trial]:
        return [self._replica.try_rows(shard, n_rows) for shard in shards]


def _spec(
    recipe: Recipe,
    teacher: Teacher,
    model: Model,
    corpus_dir: str | Path,
    store: LabelStore,
    of: dict[str, Any] | None = None,
) -> ReplicaSpec:
    return ReplicaSpec(
        recipe=recipe,
        teacher=teacher,
        model=model,
        corpus_dir=Folder(corpus_dir).everywhere,
        labels=store.everywhere,
        identity=of or store.manifest()["identity"],
    )


def _taught(spec: ReplicaSpec) -> ReplicaSpec:
    """With what a cascade's teacher has said already, where the recipe names its feedback. What
    cannot be read is labeled anew."""
    recipe = spec.recipe
    if recipe.corpus.feedback is None or not isinstance(recipe.labels, Classes):
        return spec
    own = f"{spec.labels}/taught"
    try:
        taught.collect(recipe, spec.identity, Cache(recipe.labels.cache or own, spec.identity))
    except JourneymanError as error:
        _log.warning("what the cascade's teacher said is not all copied: %s", error)
    return dataclasses.replace(spec, taught=own)


def _generation(store: LabelStore, requeue: bool) -> int:
    """The generation of commits to make; a new one begins when a finished dataset is requeued."""
    manifest = store.manifest()
    generation = manifest.get("generation", 0)
    if not requeue or not manifest.get("complete"):
        return generation
    store.finish({"generation": generation + 1, "complete": False})
    return generation + 1


class _ShardLabeler:
    """The Ray Data UDF: a replica in an actor; one shard's work in, one commit record out."""

    def __init__(self, spec: ReplicaSpec, tally: Any) -> None:
        self._failed = ""
        run = spec.recipe
        name = f"label-{uuid.uuid4().hex[:8]}"
        self._log = Log.of_ray(name, run=run.name, recipe=run.hash, labels=spec.labels)
        self._notice = spot.Notice(run.cluster.spot) if run.cluster.spot else None
        try:
            self._replica = Replica(spec, lambda *report: tally.add.remote(*report))
            self._log.info("replica started", seconds=round(self._replica.start_seconds, 1))
        except JourneymanError as error:
            self._failed = str(error)
            self._log.error("replica did not start", error=self._failed)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """An error of ours comes back as a value: Ray Data would wrap it, and try again."""
        [work] = map(_work, map(str, batch["work"]))
        if self._failed:
            return _outcome(error=self._failed)
        if self._notice and self._notice.given:  # Ray Data had queued it here
            self._log.info("shard given back", shard=work.shard)
            return _outcome(given_back=work.shard)
        try:
            commit = self._labeled(work)
        except JourneymanError as error:
            return _outcome(error=str(error))
        return _outcome(commit=json.dumps(dataclasses.asdict(commit)))

    def _labeled(self, work: Work) -> Commit:
        about = {"shard": work.shard, "generation": work.generation}
        self._log.info("shard begun", **about)
        try:
            commit = self._replica.label(work)
        except JourneymanError as error:
            self._log.error("shard failed", **about, error=str(error))
            raise
        self._log.info("shard committed", **about, **{n: getattr(commit, n) for n in _LOGGED})
        return commit


def _outcome(commit: str = "", error: str = "", given_back: str = "") -> dict[str, list[str]]:
    """What came of one shard: its commit, or why there can be none, or its name."""
    return {"commit": [commit], "error": [error], "given_back": [given_back]}


def _work(text: str) -> Work:
    value = json.loads(text)
    before = value["before"]
    return Work(
        shard=value["shard"],
        generation=value["generation"],
        before=Commit(**before) if before else None,
    )


class _Run:
    """One pass of Ray Data over the shards that are left."""

    def __init__(
        self,
        spec: ReplicaSpec,
        work: Sequence[Work],
        corpus_manifest: dict[str, Any],
        on_progress: OnProgress,
    ) -> None:
        self._spec = spec
        self._work = work
        self._on_progress = on_progress
        self._left = len(work)
        rows = {shard["name"]: shard["rows"] for shard in corpus_manifest["shards"]}
        total = corpus_manifest["rows"]
        before = total - sum(w.before.quarantined if w.before else rows[w.shard] for w in work)
        self._before = before
        self._meter = Meter(total, before, spec.teacher.price)
        self._stopped = ""

    def run(self) -> set[str]:
        """The shards that replicas gave back, to be labeled in another pass."""
        import ray

        self._lacking()
        given_back: set[str] = set()
        self._tally = self._start_tally()
        dataset = self._dataset()
        quiet_ray_data()
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        watcher.start()
        try:
            # The commit files are what counts; they are read again at the end.
            for record in dataset.iter_rows():
                if record["error"]:
                    raise ClusterError(record["error"])
                if record["given_back"]:
                    given_back.add(record["given_back"])
                    continue
                self._left -= 1
                if self._stopped:
                    raise DataError(self._stopped)
            self._show()
        except ray.exceptions.RayError as error:
            raise reason_of(error, "labeling") from error
        finally:
            stop.set()
            watcher.join(timeout=2 * _POLL_S)
            ray.kill(self._tally)
        return given_back

    def _start_tally(self) -> Any:
        """On the driver's own node: a lost one takes replicas with it, never the tally."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Tally)
        return actor.remote(self._spec.recipe.name)

    def _dataset(self) -> Any:
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        # Ray Data gives up after half an hour without progress, waiting for GPU nodes included.
        context.execution_no_progress_timeout_s = -1
        recipe, n_shards = self._spec.recipe, len(self._work)
        in_flight = recipe.labels.shards_in_flight
        low, high = recipe.cluster.replicas.min, recipe.cluster.replicas.max
        if self._spec.teacher.gives_text_alone:
            low = high = 1  # one event loop keeps an API busy, and its rate limit is one
        packed = planning.shards_per_block(n_shards, high * in_flight)
        items = [{"work": json.dumps(dataclasses.asdict(work))} for work in self._work]
        return ray.data.from_items(items, override_num_blocks=-(-n_shards // packed)).map_batches(
            _ShardLabeler,
            fn_constructor_args=(self._spec, self._tally),
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(
                min_size=low,
                max_size=high,
                initial_size=min(high, max(low, n_shards // (2 * in_flight))),
                max_concurrent_calls_per_actor=in_flight,
                # The pool grows from a utilisation of 1.75 on: tasks over concurrent calls.
                max_tasks_in_flight_per_actor=2 * in_flight,
                enable_true_multi_threading=True,
            ),
            **resources.of_actor(recipe, self._spec.teacher),
        )

    def _lacking(self) -> str:
        """What no replica can have yet, in words; raises ClusterError where none ever will."""
        needed = resources.needed(self._spec.recipe, self._spec.teacher)
        return cluster.lacking(needed, resources.KNOBS)

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(_POLL_S):
            self._show()

    def _show(self) -> None:
        import ray

        counts, replicas = ray.get(self._tally.total.remote())
        waiting_for = "" if counts.rows else self._lacking()
        progress = self._meter.read(counts, replicas, self._left, waiting_for)
        self._tally.show.remote(progress)
        self._on_progress(progress)
        share = self._spec.recipe.labels.max_quarantined
        seen = counts.rows + self._before  # a requeue's are few, and were bad before
        if seen >= _JUDGED and counts.quarantined > share * seen:
            self._stopped = (
                f"{counts.quarantined} of the first {seen} rows went to quarantine, more "
                f"than labels.max_quarantined = {share:g} allows; look at them with journeyman "
                "labels stats, mend the cause, and label again."
            )


def members(recipe: Recipe) -> Iterator[tuple[str, Teacher]]:
    """Name and settings of each teacher of an ensemble, the recipe's own first."""
    yield "teacher", recipe.teacher
    yield from recipe.ensemble.items()
