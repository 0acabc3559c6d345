"""Requests to the store, counted where they are made, and how often a replica reports.

Real replicas label real shards of a corpus behind a URL, the store is in memory. Their teacher is a
column of that corpus (``teacher.column``): what runs is all but an engine, which asks no store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore

from journeyman import corpus, models, recipe
from journeyman.labels import finishing, pipeline, planning
from journeyman.labels.replica import Counts, Replica, Work
from journeyman.labels.store import LabelStore
from journeyman.mirror import Mirror
from journeyman.teacher.written import WrittenSpeaker

_FEW, _MANY = 10, 30  # shards of two runs, which differ by what shards cost and nothing else
_SHORT_ROWS = 4
_METHODS = {"put": "PUT", "get": "GET", "get_range": "GET", "head": "HEAD", "delete": "DELETE"}
# A busy replica: rows that its teacher has at a time, how long it takes for each, and of a shard.
_AT_A_TIME, _ROW_S, _LONG_ROWS = 8, 0.05, 480


@contextlib.contextmanager
def counted(requests: Counter[str]) -> Iterator[None]:
    """By method, as an object store behind HTTP would see them: a page of a listing is one."""
    lock, own = threading.Lock(), {name: getattr(obstore, name) for name in (*_METHODS, "list")}

    def count(method: str) -> None:
        with lock:
            requests[method] += 1

    def counting(name: str) -> Callable[..., Any]:
        def ask(*arguments: Any, **named: Any) -> Any:
            count(_METHODS[name])
            return own[name](*arguments, **named)

        return ask

    def pages(*arguments: Any, **named: Any) -> Iterator[Any]:
        count("LIST")
        for i, page in enumerate(own["list"](*arguments, **named)):
            if i:
                count("LIST")
            yield page

    try:
        for name in _METHODS:
            setattr(obstore, name, counting(name))
        obstore.list = pages  # type: ignore[assignment]
        yield
    finally:
        for name, function in own.items():
            setattr(obstore, name, function)


def of_a_shard() -> dict[str, dict[str, float]]:
    """Requests by method, of each step of a run: those that one more shard makes."""
    few, many = of_a_run(_FEW), of_a_run(_MANY)
    return {
        step: {
            method: (many[step][method] - few[step][method]) / (_MANY - _FEW)
            for method in many[step]
            if many[step][method] != few[step][method]
        }
        for step in many
    }


def of_a_run(n_shards: int) -> dict[str, Counter[str]]:
    """Requests by method, of each step."""
    steps: dict[str, Counter[str]] = {s: Counter() for s in ("prepare", "label", "finish")}
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(Path(folder), n_shards, _SHORT_ROWS)
        with counted(steps["prepare"]):
            run.put_corpus()
        with counted(steps["label"]):
            run.label(lambda *_: None)
        with counted(steps["finish"]):
            run.finish()
    return steps


def reports_per_s(n_replicas: int) -> float:
    """Of one of so many replicas, that is never out of work and has some row done at any moment."""
    told: list[float] = []
    speak = WrittenSpeaker.speak

    async def speak_slowly(self: WrittenSpeaker, *arguments: Any) -> Any:
        await asyncio.sleep(_ROW_S)
        return await speak(self, *arguments)

    with tempfile.TemporaryDirectory() as folder:
        run = _Run(Path(folder), 1, _LONG_ROWS, n_replicas)
        run.put_corpus()
        WrittenSpeaker.speak = speak_slowly  # type: ignore[method-assign]
        try:
            run.label(lambda *_: told.append(time.monotonic()))
        finally:
            WrittenSpeaker.speak = speak  # type: ignore[method-assign]
    began, *within, _ = told  # the last one is of the shard's end
    return len(within) / (within[-1] - began)


class _Run:
    """Of so many shards, each with so many rows."""

    def __init__(self, folder: Path, n_shards: int, n_rows: int, n_replicas: int = 1) -> None:
        rows = [{"text": f"row {i}", "said": "yes"} for i in range(n_shards * n_rows)]
        source = folder / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._settings = recipe.parse(
            {
                "name": "requests",
                "corpus": {"sources": [str(source)], "rows_per_shard": n_rows,
                           "columns": {"text": "text", "meta": ["said"]}, "shares": {"train": 1}},
                "teacher": {"model": "none", "column": "said", "max_num_seqs": _AT_A_TIME // 2},
                "labels": {"kind": "generate", "prompt": "{{ text }}"},
                "cluster": {"replicas": {"max": n_replicas}},
            }
        )  # fmt: skip
        self._here, self._there = folder / "corpus", f"memory:///{uuid.uuid4().hex}"
        corpus.prepare(self._settings, self._here)

    def put_corpus(self) -> None:
        Mirror(local=self._here, url=f"{self._there}/corpus").push()

    def label(self, report: Callable[[str, Counts], None]) -> None:
        """What the driver does at the beginning, and then a replica."""
        settings, where = self._settings, f"{self._there}/corpus"
        self._manifest = corpus.read_manifest(where)
        self._store = LabelStore(f"{self._there}/labels")
        model = models.teacher(settings.teacher)
        self._store.open(pipeline.identity(settings, model, self._manifest["digest"]))
        self._store.finish({"codec": None})
        todo = planning.todo(self._manifest, self._store)
        spec = pipeline._spec(settings, settings.teacher, model, where, self._store)
        replica = Replica(spec, report)
        for shard in todo:
            replica.label(Work(shard=shard))
        replica.close()

    def finish(self) -> None:
        teacher = self._settings.teacher
        finishing.finish(self._store, self._settings, teacher, self._manifest)
