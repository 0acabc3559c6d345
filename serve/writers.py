"""Students that write: their engine, and how the ingress asks it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from journeyman import models
from journeyman.cascade.answering import Said
from journeyman.cascade.policy import Decision, Escalation, Written
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import consistency, written
from journeyman.certify.bundle import WrittenBundle
from journeyman.columns import unpacked
from journeyman.student import writing
from journeyman.teacher import tasks
from journeyman.teacher.answers import RationaleLabels, RowError
from serve import loading
from serve.apart import Apart
from serve.loading import Loaded
from serve.teacher import Teacher


class StudentEngine(Teacher):
    """One of them, asked as it was for its certificate."""

    whose = "student"

    def __init__(self, loaded: Loaded) -> None:
        """Starts the engine; raises ModelError, RecipeError, BundleMismatch."""
        folder = loading.student_here(loaded)
        asked = written.check(loaded.recipe)
        settings = writing.written_by(loaded.recipe, folder, asked).teacher
        super().__init__(settings, asked, loaded.bundle.columns, models.resolve(str(folder)))
        assert isinstance(loaded.bundle, WrittenBundle)
        drawn = loaded.bundle.samples
        self._samples = (
            tasks.local(consistency.question(asked, drawn), self._engine) if drawn else None
        )

    async def _label_one(self, text: str) -> Said:
        """With the samples that its confidence takes."""
        if self._samples is None:
            return await super()._label_one(text)
        said, drawn = await asyncio.gather(super()._label_one(text), self._drawn(text))
        return replace(said, samples=drawn) if isinstance(said, Written) else said

    async def _drawn(self, text: str) -> tuple[str, ...]:
        assert self._samples is not None
        try:
            labels = await self._samples.run(unpacked(text, self._columns))
        except RowError:  # none, as such a row has none in its certificate's dataset
            return ()
        assert isinstance(labels, RationaleLabels)
        return tuple(labels.reasonings)


class Writer(Apart):
    """A student that writes, behind the policy; its engine batches by itself."""

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        """Raises StudentUnavailable."""
        said = await self._there(self._engine.labels(items))
        policy = self._rule.policy
        assert isinstance(policy, WrittenPolicy)
        answers = [one if isinstance(one, Written) else None for one in said]
        return self._rule.within(items, policy.decide_batch(answers))
