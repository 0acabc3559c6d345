"""Ask one teacher in several ways about the same rows: one engine, one way after the other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from journeyman import corpus
from journeyman.cluster import reason_of
from journeyman.errors import DataError, JourneymanError, ModelError, RecipeError
from journeyman.labels import resources
from journeyman.labels.candidates import Asked, Judged, judge
from journeyman.labels.replica import Counts
from journeyman.labels.rows import columns_of
from journeyman.models import Model
from journeyman.prompts import Prompt
from journeyman.recipe import Classes, Recipe, Teacher
from journeyman.teacher import tasks
from journeyman.teacher.answers import ClassLabels, RowError
from journeyman.teacher.engine import Engine
from journeyman.teacher.remembered import Remembered
from journeyman.teacher.remote import RemoteTeacher

OWN = "recipe"  # the name of the way that the recipe goes as it is
_WARM_UP = 8  # rows that are asked before the clock runs


def ways(recipe: Recipe) -> dict[str, Classes]:
    """Name to labels section: the recipe's own, then each candidate that is another way; raises
    RecipeError."""
    if recipe.ensemble:
        raise RecipeError("label --try works on one teacher, and the recipe has an ensemble.")
    own = recipe.classes()
    others = {name: own.candidate(name) for name in own.candidates}
    # One that was taken is the recipe's own way by now.
    found = {OWN: own} | {n: way for n, way in others.items() if way.asked() != own.asked()}
    columns = ["text", *recipe.corpus.columns.meta, "label"]
    for name, labels in found.items():
        for where, template in labels.templates().items():
            Prompt(template, where if name == OWN else f"labels.candidates.{name}").check(columns)
    return found


def tried(
    recipe: Recipe,
    model: Model,
    corpus_dir: str | Path,
    n_rows: int,
    on_way: Callable[[int, str], None] = lambda number, name: None,
) -> list[Judged]:
    """The ways of a recipe on so many train rows with gold, or without where none has.

    on_way: gets the number, from 1, and the name of a way that begins. Ray is up. Raises
    RecipeError, DataError, ModelError, ClusterError.
    """
    import ray

    asked_ways = ways(recipe)
    rows, gold = _rows(recipe, corpus_dir, n_rows)
    asked_of = resources.of_actor(recipe, recipe.teacher)
    nodes = recipe.cluster.node_labels
    actor = ray.remote(_Trying).options(**asked_of).remote(recipe.teacher, model, nodes)
    try:
        said = {}
        for number, (name, labels) in enumerate(asked_ways.items(), start=1):
            on_way(number, name)
            answer = ray.get(actor.ask.remote(labels, rows))
            if isinstance(answer, JourneymanError):
                raise answer
            said[name] = answer
    except ray.exceptions.RayError as error:
        raise reason_of(error, "the trial") from error
    finally:
        ray.kill(actor)
    return judge(asked_ways, said, gold, recipe.teacher.price, recipe.report.positive)


def _rows(
    recipe: Recipe, corpus_dir: str | Path, n_rows: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Columns of each row, and int64[n] gold; by id, which is random where groups stand whole."""
    index = {label: i for i, label in enumerate(recipe.classes().classes)}
    train = [
        row
        for shard in corpus.read_manifest(corpus_dir)["shards"]
        for row in corpus.read_shard(corpus_dir, shard["name"]).to_pylist()
        if row["split"] == "train"
    ]
    if not train:
        raise DataError(f"{corpus_dir}: no train rows to try anything on; give that split some.")
    with_gold = [row for row in train if row["label"] in index]
    chosen = sorted(with_gold or train, key=lambda row: row["id"])[:n_rows]
    gold = np.array([index.get(row["label"], -1) for row in chosen], dtype=np.int64)
    return [columns_of(row) for row in chosen], gold


class _Trying:
    """An actor with the teacher in it."""

    def __init__(self, teacher: Teacher, model: Model, node_labels: dict[str, str]) -> None:
        self._teacher, self._model, self._node_labels = teacher, model, node_labels
        self._backend: Engine | RemoteTeacher | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="trying", daemon=True).start()

    def ask(self, labels: Classes, rows: Sequence[dict[str, Any]]) -> Asked | JourneymanError:
        """Errors of ours as values: Ray would wrap them."""
        future = asyncio.run_coroutine_threadsafe(self._ask(labels, rows), self._loop)
        try:
            return future.result()
        except JourneymanError as error:
            return error

    async def _ask(self, labels: Classes, rows: Sequence[dict[str, Any]]) -> Asked:
        backend = await self._started()
        try:
            if isinstance(backend, Engine):
                task = tasks.local(labels, backend, Remembered())
            else:
                task = tasks.remote(labels, backend)
        except RecipeError as error:  # of this way alone: it is told in the table
            return _refused(labels, str(error))
        at_a_time = max(1, 2 * self._teacher.max_num_seqs // task.requests_per_row)
        slots = asyncio.Semaphore(at_a_time)

        async def one(row: Mapping[str, Any]) -> ClassLabels | None:
            async with slots:
                try:
                    answer = await task.run(row)
                except RowError:
                    return None
            assert isinstance(answer, ClassLabels)
            return answer

        try:
            await asyncio.gather(*(one(row) for row in rows[:_WARM_UP]))
            started = time.monotonic()
            answers = await asyncio.gather(*(one(row) for row in rows))
        except (ModelError, RecipeError) as error:  # no chat template, say, or a bad example
            return _refused(labels, str(error))
        return _gathered(labels, answers, time.monotonic() - started)

    async def _started(self) -> Engine | RemoteTeacher:
        if self._backend is None:
            backend = (
                RemoteTeacher(self._teacher)
                if self._teacher.url
                else Engine(self._teacher, self._model, node_labels=self._node_labels)
            )
            await backend.start()
            self._backend = backend
        return self._backend


def _gathered(labels: Classes, answers: Sequence[ClassLabels | None], seconds: float) -> Asked:
    place = np.array([i for i, answer in enumerate(answers) if answer is not None], dtype=np.int64)
    found = [answer for answer in answers if answer is not None]
    masses = [answer.label_mass for answer in found if answer.label_mass is not None]
    logprobs = [answer.class_logprobs for answer in found]
    return Asked(
        place=place,
        logprobs=np.array(logprobs, dtype=np.float64).reshape(len(found), len(labels.classes)),
        label_mass=float(np.mean(masses)) if masses else None,
        counts=Counts(
            rows=len(answers),
            prompt_tokens=sum(answer.n_prompt_tokens for answer in found),
            cached_tokens=sum(answer.n_cached_tokens for answer in found),
            output_tokens=sum(answer.n_output_tokens for answer in found),
            replica_seconds=seconds,
        ),
    )


def _refused(labels: Classes, why: str) -> Asked:
    return Asked(
        place=np.zeros(0, np.int64),
        logprobs=np.zeros((0, len(labels.classes))),
        label_mass=None,
        counts=Counts(),
        refusal=why,
    )
