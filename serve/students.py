"""Encoders as students, on the ingress replica's own CPUs; and the rule by which any student's
answers are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from journeyman.cascade.answering import StudentDecisions
from journeyman.cascade.batcher import Batcher
from journeyman.cascade.policy import Decision, Escalation, Policy, beyond
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import written
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from journeyman.certify.thresholds import ESCALATE_EVERYTHING
from journeyman.columns import n_characters, unpacked
from journeyman.errors import BundleMismatch
from journeyman.student.inputs import Inputs
from journeyman.student.models import Classifier
from serve import loading
from serve.loading import Loaded

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
    def is_tightened(self) -> bool:
        """Whether audits have found the promise broken, so that what is certified holds no more."""
        return (self._held or self.policy).accept_above > self._certified

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


class Student(StudentDecisions, Protocol):
    """Decides on texts between ``start`` and ``close``. unready: why it cannot, None if it can;
    wait_s: seconds until what waits for it is decided, 0 where nobody knows."""

    @property
    def unready(self) -> str | None: ...
    @property
    def wait_s(self) -> float: ...
    def start(self) -> None: ...
    async def close(self) -> None: ...


class Encoders:
    """One student or several that are asked in turn, in this process, each with batches that grow
    with the load."""

    def __init__(
        self,
        loaded: Loaded,
        classifiers: Sequence[Classifier],
        rule: Rule,
        worked: Callable[[float], None] = lambda _: None,
    ) -> None:
        """worked: told after each batch how many seconds it took."""
        bundle, cascade = loaded.bundle, loaded.recipe.cascade
        assert isinstance(bundle, PolicyBundle)
        self._columns, self._rule = bundle.columns, rule
        learner = loaded.recipe.learner()
        reads = [learner.model_copy(update={"text": stage.text, "text_pair": stage.text_pair})
                 for stage in bundle.before]  # fmt: skip
        self._asked = list(zip(map(Inputs, [*reads, learner]), classifiers, strict=True))
        self._batchers = [
            Batcher(
                partial(self.decide, stage=stage),
                cascade.max_batch_size,
                worked,
                size_of=partial(_tokens, most=learner.max_length),
                max_total=cascade.max_batch_tokens,
            )
            for stage in range(len(classifiers))
        ]
        self.unready = None

    def start(self) -> None:
        for batcher in self._batchers:
            batcher.start()

    async def close(self) -> None:
        for batcher in self._batchers:
            await batcher.close()

    @property
    def wait_s(self) -> float:
        return sum(batcher.wait_s for batcher in self._batchers)  # which share the CPU

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        decided: dict[int, Decision | Escalation] = {}
        left = list(range(len(items)))
        for stage, batcher in enumerate(self._batchers):
            if left:
                said = await batcher.submit([items[i] for i in left])
                decided |= zip(left, said, strict=True)
                left = [i for i in left if self._policy.goes_on(decided[i], stage)]
        return [decided[i] for i in range(len(items))]

    def decide(self, texts: Sequence[str], stage: int = 0) -> list[Decision | Escalation]:
        """By one of the students, in its batcher's thread."""
        inputs, classifier = self._asked[stage]
        rows = inputs.all(unpacked(text, self._columns) for text in texts)
        logits = classifier.logits(rows, _ROWS_A_PASS, _TOKENS_A_PASS)
        return self._rule.within(texts, self._policy.decide_batch(logits, stage))

    @property
    def _policy(self) -> Policy:
        policy = self._rule.policy
        assert isinstance(policy, Policy)
        return policy


def _tokens(text: str, most: int) -> int:
    """That a student reads of a text, about; it cuts it at so many."""
    return min(most, len(text) // _CHARACTERS_A_TOKEN + 1)


def classifiers(loaded: Loaded) -> list[Classifier]:
    """The students of this process, none where they write; raises ModelError, BundleMismatch."""
    if isinstance(loaded.bundle, WrittenBundle):
        return []
    return [_classifier(folder, loaded.bundle) for folder in loading.students_here(loaded)]


def _classifier(folder: Path, bundle: PolicyBundle) -> Classifier:
    student = Classifier.load(folder, threads=STUDENT_CPUS)
    if student.labels != bundle.label_names:
        raise BundleMismatch(
            f"{folder} answers with the labels {', '.join(student.labels)}, the "
            f"bundle with {', '.join(bundle.label_names)}. Run `journeyman certify`."
        )
    return student
