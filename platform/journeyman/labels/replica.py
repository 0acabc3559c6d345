"""A labeling replica: one teacher, several corpus shards in it at a time, and their commits."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import corpus, models
from journeyman.errors import DataError, ModelError
from journeyman.labels import attempts, schema
from journeyman.labels.attempts import Note, Plan
from journeyman.labels.cache import Cache
from journeyman.labels.codec import Codec
from journeyman.labels.parquet import parquet_bytes
from journeyman.labels.rows import Backend, Fate, Row, RowLabeler, columns_of, quarantined
from journeyman.labels.schema import Commit, Filtered, Quarantined
from journeyman.labels.store import LabelStore, in_order
from journeyman.models import Model
from journeyman.recipe import Generate, Labels, Logits, Recipe, Teacher
from journeyman.teacher import tasks
from journeyman.teacher.answers import RowError
from journeyman.teacher.engine import Engine
from journeyman.teacher.remembered import Remembered
from journeyman.teacher.remote import RemoteTeacher
from journeyman.teacher.tokens import entries
from journeyman.teacher.written import Written

# One process takes the reports of all replicas: so many a second at most, and of each one often
# enough that progress.py does not count it as gone.
_REPORTS_PER_S = 400
_SHORTEST_REPORT_INTERVAL_S, _LONGEST_REPORT_INTERVAL_S = 0.5, 5.0
_STARTS = 3  # of an engine, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a replica did since it last reported."""

    rows: int = 0
    quarantined: int = 0
    filtered: int = 0
    copied: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    engine_restarts: int = 0
    replica_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """All that a replica needs to begin; travels to its actor.

    identity: of the dataset at ``labels``; taught: where rows are to be copied from, if there is no
    ``labels.cache``.
    """

    recipe: Recipe
    teacher: Teacher
    model: Model
    corpus_dir: str | Path
    labels: str
    identity: dict[str, Any]
    taught: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One corpus shard to label; generation > 0: again, the rows that ``before`` quarantined."""

    shard: str
    generation: int = 0
    before: Commit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a few rows took, for an estimate; bytes: of their labels on disk."""

    rows: list[Counts]
    seconds: float
    start_seconds: float
    bytes: int


Record = dict[str, Any]  # of schema.label_schema


def report_interval_s(n_replicas: int) -> float:
    """Of each of so many, at work; one with nothing to say takes twice as long."""
    interval_s = max(_SHORTEST_REPORT_INTERVAL_S, n_replicas / _REPORTS_PER_S)
    return min(interval_s, _LONGEST_REPORT_INTERVAL_S)


def _cache(shared: str | None, spec: ReplicaSpec) -> Cache | None:
    if shared is not None:
        return Cache(shared, spec.identity)
    return Cache(spec.taught, spec.identity, only_read=True) if spec.taught else None


class Replica:
    """Labels corpus shards; ``label`` may be called from several threads at a time."""

    def __init__(self, spec: ReplicaSpec, report: Callable[[str, Counts], None]) -> None:
        """Starts the teacher; report: is given this replica's name and what it did since.

        Raises ModelError or RecipeError.
        """
        self._spec = spec
        self._labels = spec.recipe.labels
        self._store = LabelStore(spec.labels)
        self._cache = _cache(self._labels.cache, spec)
        self._name = uuid.uuid4().hex[:8]
        self._report = report
        self._report_interval_s = report_interval_s(spec.recipe.cluster.replicas.max)
        self._counts: dict[str, float] = {}
        self._restarts = 0  # since its last commit
        self._alive_since = self._committed_at = self._reported_at = time.monotonic()
        report(self._name, Counts())
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="replica", daemon=True).start()
        self._call(self._start())
        self.start_seconds = time.monotonic() - self._alive_since

    def label(self, work: Work) -> Commit:
        """Label one corpus shard and commit it; returns the commit that stands."""
        return self._call(self._label(work))

    def try_rows(self, shard: str, n_rows: int) -> Trial:
        """Label the first rows of a shard and write nothing: what an estimate is made from."""
        return self._call(self._try_rows(shard, n_rows))

    def close(self) -> None:
        """Stop the teacher; rows under way are lost to this replica."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> None:
        labels = self._labels
        self._backend: Backend
        self._codec: Codec | None = None
        if self._spec.teacher.url:
            remote = RemoteTeacher(self._spec.teacher)
            await remote.start()
            self._backend, task = remote, tasks.remote(labels, remote)
            max_num_seqs = self._spec.teacher.max_num_seqs
        elif self._spec.teacher.column:
            self._backend, task = Written(), tasks.written(labels, self._spec.teacher.column)
            max_num_seqs = self._spec.teacher.max_num_seqs
        else:
            model = models.here(self._spec.model, lambda: models.teacher(self._spec.teacher))
            nodes = self._spec.recipe.cluster.node_labels
            engine = Engine(self._spec.teacher, model, _draws(labels), nodes)
            await self._start_engine(engine)
            self._backend, task = engine, tasks.local(labels, engine, Remembered())
            max_num_seqs = engine.max_num_seqs
            self._codec = codec_of(labels, self._spec.model)
        self._task = task
        # Twice what the engine holds, so that its queue never runs dry.
        in_flight = max(1, 2 * max_num_seqs // task.requests_per_row)
        self._rows = RowLabeler(
            labels,
            self._backend,
            task,
            in_flight,
            self._restarted,
            outage_s=self._spec.teacher.start_timeout_s,
            salt=int(self._spec.model.weights_digest[:16], 16),
        )
        self._heartbeat = asyncio.create_task(self._beat())
        # A full collection walks through all that vLLM and torch have imported: a third of a
        # second now and then. What is there by now stays.
        gc.collect()
        gc.freeze()

    async def _close(self) -> None:
        self._heartbeat.cancel()
        self._backend.close()

    async def _start_engine(self, engine: Engine) -> None:
        """Once, or the settings are wrong; again, where this dataset has shards that were labeled
        with them: a run must not stop for one engine of many that was killed while it started."""
        for tries_left in reversed(range(_STARTS)):
            try:
                return await engine.start()
            except ModelError:
                refused = engine.alive  # it runs, but cannot do what is asked of it
                if refused or not tries_left or not await asyncio.to_thread(self._store.done):
                    raise

    async def _label(self, work: Work) -> Commit:
        started = time.monotonic()
        # Ray runs a task again whose actor died after the commit, or whose record it lost.
        standing = await asyncio.to_thread(self._store.standing, work.shard, work.generation)
        if standing is not None:
            return standing
        table = await asyncio.to_thread(corpus.read_shard, self._spec.corpus_dir, work.shard)
        rows: list[Row] = table.to_pylist()
        kept, kept_out = await self._kept(work)
        waiting = [row for row in rows if row["id"] not in kept and row["id"] not in kept_out]
        copied = await self._copied(waiting)
        fates = await self._fates(work, [row for row in waiting if row["id"] not in copied])
        records = kept | copied | {k: f for k, f in fates.items() if isinstance(f, dict)}
        left_out = [f for f in fates.values() if isinstance(f, Filtered)] + list(kept_out.values())
        bad = [f for f in fates.values() if isinstance(f, Quarantined)]
        labeled = [records[row["id"]] for row in rows if row["id"] in records]
        fresh = [f for f in fates.values() if isinstance(f, dict)]
        commit = Commit(
            shard=work.shard,
            generation=work.generation,
            data="",
            quarantine=None,
            filtered_file=None,
            sha256="",
            rows=len(rows),
            ok=len(labeled),
            quarantined=len(bad),
            filtered=len(left_out),
            truncated=sum(record["truncated"] for record in labeled),
            copied=len(copied) + (work.before.copied if work.before else 0),
            prompt_tokens=_sum(fresh, "n_prompt_tokens", work),
            cached_tokens=_sum(fresh, "n_cached_tokens", work),
            output_tokens=_sum(fresh, "n_output_tokens", work),
            seconds=round(time.monotonic() - started, 3),
            replica_seconds=self._seconds_since_commit(work),
            bytes=0,
            engine_restarts=self._restarts_since_commit(work),
        )
        labels = self._table(labeled)
        await asyncio.to_thread(self._check_dataset)
        standing = await asyncio.to_thread(self._store.write, commit, labels, bad, left_out)
        await asyncio.to_thread(self._afterwards, standing, labels)
        self._flush()
        return standing

    async def _kept(self, work: Work) -> tuple[dict[str, Record], dict[str, Filtered]]:
        """What an earlier generation made of the shard's rows, less its quarantined ones."""
        if work.before is None:
            return {}, {}
        table = await asyncio.to_thread(self._store.read_shard, work.before)
        left_out = await asyncio.to_thread(self._store.read_filtered, work.before)
        return {r["id"]: r for r in table.to_pylist()}, {f.id: f for f in left_out}

    async def _copied(self, rows: Sequence[Row]) -> dict[str, Record]:
        """Records that the cache has for these rows."""
        if self._cache is None or not rows:
            return {}
        found = await asyncio.to_thread(self._cache.lookup, [row["id"] for row in rows])
        self._count(rows=len(found), copied=len(found))
        return {
            row["id"]: found[row["id"]] | {"split": row["split"], "gold": row["label"]}
            for row in rows
            if row["id"] in found
        }

    async def _fates(
        self, work: Work, rows: Sequence[Row]
    ) -> dict[str, Record | Quarantined | Filtered]:
        """What becomes of each row, by id; rows that killed their replica before are run with
        care, as the shard's note says, and those to blame are not run at all."""
        by_id = {row["id"]: row for row in rows}
        left = await asyncio.to_thread(self._store.read_attempts, work.shard)
        plan = attempts.plan(
            Note.from_json(left) if left else None,
            sorted(by_id, key=lambda i: self._prefix(by_id[i])),
            self._labels.max_attempts,
        )
        fates: dict[str, Record | Quarantined | Filtered] = {}
        for blamed in plan.note.blamed:
            if blamed in by_id:
                message = "its replica died on this row alone, again and again."
                fates[blamed] = quarantined(
                    by_id[blamed], "ReplicaDied", message, self._labels.max_attempts
                )
                self._count(rows=1, quarantined=1)
        run = self._run_alone if plan.careful else self._run_together
        for group in plan.groups:
            some = [by_id[i] for i in group]
            fates |= dict(zip(group, await run(work.shard, plan, some), strict=True))
        return fates

    async def _run_together(
        self, shard: str, plan: Plan, rows: Sequence[Row]
    ) -> list[Record | Quarantined | Filtered]:
        await self._note(shard, plan.before([row["id"] for row in rows]))
        return await asyncio.gather(*(self._settled(row) for row in rows))

    async def _run_alone(
        self, shard: str, plan: Plan, rows: Sequence[Row]
    ) -> list[Record | Quarantined | Filtered]:
        """The note names rows only while they are in the teacher, and no others are."""
        await self._note(shard, plan.note)
        async with self._rows.alone():
            await self._note(shard, plan.before([row["id"] for row in rows]))
            fates = await self._rows.fates_alone(rows)
            await self._note(shard, plan.note)
        return [self._record(row, fate) for row, fate in zip(rows, fates, strict=True)]

    async def _note(self, shard: str, note: Note) -> None:
        await asyncio.to_thread(self._store.write_attempts, shard, note.to_json())

    async def _settled(self, row: Row) -> Record | Quarantined | Filtered:
        return self._record(row, await self._rows.fate(row))

    def _record(self, row: Row, fate: Fate) -> Record | Quarantined | Filtered:
        """Encode at once: a shard in work holds bytes, not arrays."""
        if isinstance(fate, Quarantined):
            self._count(rows=1, quarantined=1)
            return fate
        if isinstance(fate, Filtered):
            self._count(rows=1, filtered=1)
            return fate
        self._count(
            rows=1,
            prompt_tokens=fate.n_prompt_tokens,
            cached_tokens=fate.n_cached_tokens,
            output_tokens=fate.n_output_tokens,
        )
        return schema.record(row, fate, self._codec)

    def _prefix(self, row: Row) -> str:
        try:
            return self._task.prefix(columns_of(row))
        except RowError:  # which is said where the row is run
            return ""

    def _table(self, records: Sequence[Record]) -> Any:
        import pyarrow as pa

        return pa.Table.from_pylist(list(records), schema=schema.label_schema(self._labels.kind))

    def _check_dataset(self) -> None:
        """A replica may outlive its run by some seconds, and --new put another dataset there."""
        if in_order(self._store.manifest()["identity"]) != in_order(self._spec.identity):
            raise DataError(
                f"{self._store.where}: another dataset has taken the place of this replica's own, "
                "whose labels are not written; stop this run."
            )

    def _afterwards(self, commit: Commit, labels: Any) -> None:
        self._store.clear_attempts(commit.shard)
        if self._cache is not None:
            self._cache.add(commit, labels)

    async def _try_rows(self, shard: str, n_rows: int) -> Trial:
        table = await asyncio.to_thread(corpus.read_shard, self._spec.corpus_dir, shard)
        rows: list[Row] = table.slice(0, n_rows).to_pylist()
        started = time.monotonic()
        settled = await asyncio.gather(*(self._settled(row) for row in rows))
        seconds = time.monotonic() - started
        records = [fate for fate in settled if isinstance(fate, dict)]
        return Trial(
            rows=[_counts_of(fate) for fate in settled],
            seconds=seconds,
            start_seconds=self.start_seconds,
            bytes=len(await asyncio.to_thread(parquet_bytes, self._table(records))),
        )

    def _seconds_since_commit(self, work: Work) -> float:
        """This replica's time since its last commit: over all commits, its whole time."""
        now = time.monotonic()
        seconds, self._committed_at = now - self._committed_at, now
        return round(seconds + (work.before.replica_seconds if work.before else 0.0), 3)

    def _restarts_since_commit(self, work: Work) -> int:
        """As its time: counted once, however many shards were in work."""
        restarts, self._restarts = self._restarts, 0
        return restarts + (work.before.engine_restarts if work.before else 0)

    def _restarted(self) -> None:
        self._restarts += 1
        self._count(engine_restarts=1)

    async def _beat(self) -> None:
        """Tell that this replica lives, also when no row is done for a while."""
        while True:
            await asyncio.sleep(2 * self._report_interval_s)
            self._flush()

    def _count(self, **more: int) -> None:
        for name, n in more.items():
            self._counts[name] = self._counts.get(name, 0) + n
        if time.monotonic() - self._reported_at >= self._report_interval_s:
            self._flush()

    def _flush(self) -> None:
        now = time.monotonic()
        since, self._reported_at = now - self._reported_at, now
        counts, self._counts = self._counts, {}
        self._report(self._name, Counts(**counts, replica_seconds=since))  # type: ignore[arg-type]


def codec_of(labels: Labels, model: Model) -> Codec | None:
    """The codec of a kind that records distributions; None where the teacher gives none."""
    if isinstance(labels, Logits | Generate) and model.vocab_size:
        return Codec(name=labels.codec, vocab_size=model.vocab_size, k=entries(labels))
    return None


def _draws(labels: Labels) -> int:
    if isinstance(labels, Logits | Generate) and labels.codec == "sampled":
        return labels.draws
    return 0


def _sum(records: Sequence[Record], column: str, work: Work) -> int:
    """Tokens spent on these rows, and on the shard before; copied rows took none."""
    names = {"n_prompt_tokens": "prompt_tokens", "n_cached_tokens": "cached_tokens",
             "n_output_tokens": "output_tokens"}  # fmt: skip
    before = getattr(work.before, names[column]) if work.before else 0
    return before + sum(record[column] for record in records)


def _counts_of(fate: Record | Quarantined | Filtered) -> Counts:
    if isinstance(fate, Quarantined):
        return Counts(rows=1, quarantined=1)
    if isinstance(fate, Filtered):
        return Counts(rows=1, filtered=1)
    return Counts(
        rows=1,
        prompt_tokens=fate["n_prompt_tokens"],
        cached_tokens=fate["n_cached_tokens"],
        output_tokens=fate["n_output_tokens"],
    )
