"""A labeling replica: one engine, several corpus shards in it at a time, each row's fate.

Errors are data: a row that cannot be labeled goes to quarantine with its reason. The engine's
death is the replica's own business: it starts another one, keeps the finished rows, and finds the
row to blame by trying the ones in flight one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import corpus
from journeyman.errors import ModelError
from journeyman.labels import schema
from journeyman.labels.schema import Commit, Quarantined
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.teacher.engine import Engine, EngineDied
from journeyman.teacher.tasks import ClassLabels, ClassTask, RowError, row_values

if TYPE_CHECKING:
    import pyarrow as pa

_REPORT_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a replica did since it last reported."""

    rows: int = 0
    quarantined: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    engine_restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """All that a replica needs to begin; travels to its actor."""

    recipe: Recipe
    model: Model
    corpus_dir: Path
    labels_dir: Path


class Replica:
    """Labels corpus shards; ``label`` may be called from several threads at a time."""

    def __init__(self, spec: ReplicaSpec, report: Callable[[Counts], None]) -> None:
        """Starts the engine; raises ModelError or RecipeError."""
        self._spec = spec
        self._labels = spec.recipe.labels
        self._store = LabelStore(spec.labels_dir)
        self._report = report
        self._counts: dict[str, int] = {}
        self._restarts = 0
        self._reported_at = 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="replica", daemon=True).start()
        self._call(self._start())

    def label(self, shard: str) -> Commit:
        """Label one corpus shard and commit it; returns the commit that stands."""
        return self._call(self._label(shard))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._engine.close)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> None:
        self._engine = Engine(self._spec.recipe.teacher, self._spec.model)
        await self._engine.start()
        self._task = ClassTask(self._labels, self._engine.tokenizer, self._engine.max_model_len)
        # Twice what the engine holds, so that its queue never runs dry.
        in_flight = 2 * self._spec.recipe.teacher.max_num_seqs // self._task.prompts_per_row
        self._in_flight = asyncio.Semaphore(max(1, in_flight))
        self._suspects = 0
        self._calm = asyncio.Event()  # no row is under suspicion
        self._calm.set()
        self._alone = asyncio.Lock()

    async def _label(self, shard: str) -> Commit:
        started = time.monotonic()
        table = await asyncio.to_thread(corpus.read_shard, self._spec.corpus_dir / shard)
        rows = table.to_pylist()
        restarts_before = self._restarts
        fates = await asyncio.gather(*(self._fate(row) for row in rows))
        labeled = [(r, f) for r, f in zip(rows, fates, strict=True) if isinstance(f, ClassLabels)]
        quarantined = [f for f in fates if isinstance(f, Quarantined)]
        commit = Commit(
            shard=shard,
            data="",
            quarantine=None,
            sha256="",
            rows=len(rows),
            ok=len(labeled),
            quarantined=len(quarantined),
            filtered=0,
            prompt_tokens=sum(f.n_prompt_tokens for _, f in labeled),
            output_tokens=sum(f.n_output_tokens for _, f in labeled),
            seconds=round(time.monotonic() - started, 3),
            bytes=0,
            engine_restarts=self._restarts - restarts_before,
        )
        standing = await asyncio.to_thread(self._store.write, commit, _table(labeled), quarantined)
        self._flush()
        return standing

    async def _fate(self, row: dict[str, Any]) -> ClassLabels | Quarantined:
        """Labels of a row, or the reason why it has none."""
        values = row_values(row["text"], json.loads(row["meta"] or "{}"))
        attempts, error = 0, ""
        while attempts < self._labels.max_attempts:
            attempts += 1
            try:
                async with self._in_flight:
                    await self._calm.wait()
                    return await self._labels_of(values)
            except RowError as reason:
                return self._quarantine(row, type(reason).__name__, str(reason), attempts)
            except EngineDied:
                verdict = await self._try_alone(values)
                if isinstance(verdict, ClassLabels):
                    return verdict
                message = "the engine died on this row alone, again and again."
                return self._quarantine(row, "EngineDied", message, verdict)
            except TimeoutError:
                error = f"no answer within {self._spec.recipe.teacher.request_timeout_s:g} s."
        return self._quarantine(row, "TimeoutError", error, attempts)

    async def _try_alone(self, values: dict[str, Any]) -> ClassLabels | int:
        """Run a row that was in flight when the engine died, with no other beside it.

        Returns its labels, or the number of attempts after which it is to blame.
        """
        self._suspects += 1
        self._calm.clear()
        try:
            async with self._alone:
                for _ in range(max(1, self._labels.max_attempts - 1)):  # one is behind it
                    await self._restart()
                    with contextlib.suppress(EngineDied):
                        return await self._labels_of(values)
            return self._labels.max_attempts
        finally:
            self._suspects -= 1
            if not self._suspects:
                await self._restart()
                self._calm.set()

    async def _labels_of(self, values: dict[str, Any]) -> ClassLabels:
        labels = await self._task.run(self._engine, values)
        self._count(
            rows=1,
            prompt_tokens=labels.n_prompt_tokens,
            output_tokens=labels.n_output_tokens,
        )
        return labels

    async def _restart(self) -> None:
        if self._engine.alive:
            return
        try:
            await self._engine.start()
        except ModelError:
            # Only a process that cannot start its engine again leaves; Ray starts another one.
            os._exit(1)
        self._restarts += 1
        self._count(engine_restarts=1)

    def _quarantine(
        self, row: dict[str, Any], error_class: str, message: str, attempts: int
    ) -> Quarantined:
        self._count(rows=1, quarantined=1)
        return Quarantined(
            id=row["id"],
            input=json.dumps(row, ensure_ascii=False),
            error_class=error_class,
            message=message,
            attempts=attempts,
        )

    def _count(self, **more: int) -> None:
        for name, n in more.items():
            self._counts[name] = self._counts.get(name, 0) + n
        if time.monotonic() - self._reported_at >= _REPORT_INTERVAL_S:
            self._flush()

    def _flush(self) -> None:
        self._reported_at = time.monotonic()
        names = Counts.__slots__
        self._report(Counts(**{name: self._counts.pop(name, 0) for name in names}))


def _table(labeled: list[tuple[dict[str, Any], ClassLabels]]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(
        [
            {
                "id": row["id"],
                "split": row["split"],
                "gold": row["label"],
                "class_logprobs": labels.class_logprobs,
                "label_mass": labels.label_mass,
                "n_prompt_tokens": labels.n_prompt_tokens,
                "n_output_tokens": labels.n_output_tokens,
                "finish_reason": "length",
            }
            for row, labels in labeled
        ],
        schema=schema.classes_schema(),
    )
