"""Encoders as students, on the ingress replica's own CPUs; and the rule by which any student's
answers are accepted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from journeyman.cascade.answering import StudentDecisions
from journeyman.cascade.batcher import Batcher
from journeyman.cascade.policy import Decision, Escalation, Policy, beyond
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import written
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from journeyman.certify.thresholds import ESCALATE_EVERYTHING
from journeyman.columns import n_characters, unpacked
from journeyman.errors import BundleMismatch
from journeyman.recipe import Cascade
from journeyman.student.inputs import Inputs
from journeyman.student.models import Classifier
from serve import loading
from serve.loading import Loaded

Result = TypeVar("Result")

# Of a replica, for its student, or several that share it, and as many threads. More would be faster
# beside an idle teacher (378 against 247 rows/s on two cores), but beside a busy one on the same
# cores each waits for the other to be scheduled: 20 requests/s against 157.
STUDENT_CPUS = 1

# Of a batch, sorted by length, for one forward pass: 32 texts hold all lengths, and short passes
# pad less (279 against 206 rows/s with 8 in place of 32, on one thread).
_ROWS_A_PASS = 8
# And so many tokens, padding included: a long text has a pass of its own, and pads no short ones.
_TOKENS_A_PASS = 512
_CHARACTERS_A_TOKEN = 4  # about; to tokenise each text twice would cost more than it tells


class Rule:
    """A bundle's policy, as strict as the audits have made it."""

    def __init__(self, loaded: Loaded) -> None:
        bundle = loaded.bundle
        self.policy: Policy | WrittenPolicy = (
            WrittenPolicy.from_bundle(bundle, written.comparison(loaded.recipe))
            if isinstance(bundle, WrittenBundle)
            else Policy.from_bundle(bundle)
        )
        self.when_changed: Callable[[], None] = lambda: None
        self._certified = bundle.accept_above
        self._longest, self._columns = bundle.longest, bundle.columns
        self._held: Policy | WrittenPolicy | None = None

    def hold(self) -> None:
        """Answer nothing until it is known how strict the audits have made the rule."""
        self._held = self.policy
        self.policy = self.policy.tightened(ESCALATE_EVERYTHING)

    @property
    def is_held(self) -> bool:
        return self._held is not None

    @property
    def is_tightened(self) -> bool:
        """Whether audits have found the promise broken, so that what is certified holds no more."""
        return (self._held or self.policy).accept_above > self._certified

    def decided(
        self, texts: Sequence[str], logits: np.ndarray, stage: int
    ) -> list[Decision | Escalation]:
        """What a student that classifies decides of these texts. logits: float32[n, c], its own;
        stage: its place among those that are asked in turn."""
        policy = self.policy
        assert isinstance(policy, Policy)
        return self.within(texts, policy.decide_batch(logits, stage))

    def goes_on(self, decided: Decision | Escalation, stage: int) -> bool:
        """See ``Policy.goes_on``."""
        return isinstance(self.policy, Policy) and self.policy.goes_on(decided, stage)

    def within(
        self, texts: Sequence[str], decided: Sequence[Decision | Escalation]
    ) -> list[Decision | Escalation]:
        """What the student decided of these texts, but for those that are longer than any that was
        certified: it would cut them, and the promise is not about them."""
        return [
            beyond(one) if self.is_outside(text) else one
            for text, one in zip(texts, decided, strict=True)
        ]

    def is_outside(self, text: str) -> bool:
        """Whether a text is longer than any that was certified."""
        if self._longest is None:
            return False
        return n_characters(unpacked(text, self._columns), self._columns) > self._longest

    def tighten(self, accept_above: float) -> None:
        changed = self._held is not None
        if self._held is not None:
            self.policy, self._held = self._held, None
        if accept_above > self.policy.accept_above:
            self.policy = self.policy.tightened(accept_above)
            changed = True
        if changed:
            self.when_changed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """Of a student apart: what waits takes too long for a further request; a value, as
    ``Unavailable`` is."""

    wait_s: float


class Student(StudentDecisions, Protocol):
    """Decides on texts between ``start`` and ``close``. unready: why it cannot, None if it can;
    wait_s: seconds until what waits for it is decided, 0 where nobody knows."""

    @property
    def unready(self) -> str | None: ...
    @property
    def wait_s(self) -> float: ...
    def start(self) -> None: ...
    async def close(self) -> None: ...


class Reader:
    """One student that classifies, with what it reads of a row. One thread at a time."""

    def __init__(self, inputs: Inputs, classifier: Classifier, columns: Sequence[str]) -> None:
        self.classifier = classifier
        self._inputs, self._columns = inputs, columns

    def logits(
        self, texts: Sequence[str], n_rows: int | None = None, n_tokens: int | None = None
    ) -> np.ndarray:
        """float32[n, c]; n_rows, n_tokens: of a forward pass, if not as few as suit one thread."""
        rows = self._inputs.all(unpacked(text, self._columns) for text in texts)
        return self.classifier.logits(rows, n_rows or _ROWS_A_PASS, n_tokens or _TOKENS_A_PASS)

    def close(self) -> None:
        """Give its memory back: Serve freezes what a replica began with, so nothing collects it."""
        self.classifier.unload()


def readers(loaded: Loaded, threads: int = STUDENT_CPUS, *, on_gpu: bool = False) -> list[Reader]:
    """The students of a bundle in the order in which they are asked; raises ModelError,
    BundleMismatch. threads: of this process."""
    bundle, learner = loaded.bundle, loaded.recipe.learner()
    assert isinstance(bundle, PolicyBundle)
    reads = [learner.model_copy(update={"text": stage.text, "text_pair": stage.text_pair})
             for stage in bundle.before]  # fmt: skip
    folders = loading.students_here(loaded)
    return [
        Reader(Inputs(settings), _classifier(folder, bundle, threads, on_gpu), bundle.columns)
        for settings, folder in zip([*reads, learner], folders, strict=True)
    ]


async def in_turn(
    stages: Sequence[Callable[[Sequence[str]], Awaitable[list[Decision | Escalation]]]],
    texts: Sequence[str],
    rule: Rule,
) -> list[Decision | Escalation]:
    """What each of several students decides of the texts that the one before passes on."""
    decided: dict[int, Decision | Escalation] = {}
    left = list(range(len(texts)))
    for stage, decide in enumerate(stages):
        if left:
            said = await decide([texts[i] for i in left])
            decided |= zip(left, said, strict=True)
            left = [i for i in left if rule.goes_on(decided[i], stage)]
    return [decided[i] for i in range(len(texts))]


class Encoders:
    """One student or several that are asked in turn, in this process, each with batches that grow
    with the load."""

    def __init__(
        self,
        loaded: Loaded,
        readers: Sequence[Reader],
        rule: Rule,
        worked: Callable[[float], None] = lambda _: None,
    ) -> None:
        """worked: told after each batch how many seconds it took."""
        self._readers, self._rule = readers, rule
        self._batchers: list[Batcher[str, Decision | Escalation]] = [
            batcher_of(partial(self.decide, stage=stage), loaded.recipe.cascade, loaded, worked)
            for stage in range(len(readers))
        ]
        self.unready = None

    def start(self) -> None:
        for batcher in self._batchers:
            batcher.start()

    async def close(self) -> None:
        for batcher in self._batchers:
            await batcher.close()
        for reader in self._readers:
            reader.close()

    @property
    def wait_s(self) -> float:
        return sum(batcher.wait_s for batcher in self._batchers)  # which share the CPU

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        return await in_turn([batcher.submit for batcher in self._batchers], items, self._rule)

    def decide(self, texts: Sequence[str], stage: int = 0) -> list[Decision | Escalation]:
        """By one of the students, in its batcher's thread."""
        return self._rule.decided(texts, self._readers[stage].logits(texts), stage)


def batcher_of(
    work: Callable[[Sequence[str]], Sequence[Result]],
    place: Cascade,
    loaded: Loaded,
    worked: Callable[[float], None],
) -> Batcher[str, Result]:
    """Of a student that classifies. place: says how large."""
    return Batcher(
        work,
        place.max_batch_size,
        worked,
        size_of=partial(_tokens, most=loaded.recipe.learner().max_length),
        max_total=place.max_batch_tokens,
    )


def _tokens(text: str, most: int) -> int:
    """That a student reads of a text, about; it cuts it at so many."""
    return min(most, len(text) // _CHARACTERS_A_TOKEN + 1)


def _classifier(folder: Path, bundle: PolicyBundle, threads: int, on_gpu: bool) -> Classifier:
    student = Classifier.load(folder, threads=threads)
    if student.labels != bundle.label_names:
        raise BundleMismatch(
            f"{folder} answers with the labels {', '.join(student.labels)}, the "
            f"bundle with {', '.join(bundle.label_names)}. Run `journeyman certify`."
        )
    if on_gpu:
        student.model.to("cuda")
    else:
        student.pack()
    return student
