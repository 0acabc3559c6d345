"""An encoder as student, on the ingress replica's own CPUs; and the rule by which any student's
answers are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from journeyman.cascade.answering import StudentDecisions
from journeyman.cascade.batcher import Batcher
from journeyman.cascade.policy import Decision, Escalation, Policy
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import written
from journeyman.certify.bundle import WrittenBundle
from journeyman.certify.thresholds import ESCALATE_EVERYTHING
from journeyman.columns import unpacked
from journeyman.errors import BundleMismatch
from journeyman.student.inputs import Inputs
from journeyman.student.models import Classifier
from serve import loading
from serve.loading import Loaded

# Of a replica, for the student, and as many threads. More would be faster beside an idle teacher
# (378 against 247 rows/s on two cores), but beside a busy one on the same cores each waits for the
# other to be scheduled: 20 requests/s against 157.
STUDENT_CPUS = 1

# Of a batch, sorted by length, for one forward pass: 32 texts hold all lengths, and short passes
# pad less (279 against 206 rows/s with 8 in place of 32, on one thread).
_ROWS_A_PASS = 8


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
        self._held: Policy | WrittenPolicy | None = None

    def hold(self) -> None:
        """Answer nothing until it is known how strict the audits have made the rule."""
        self._held = self.policy
        self.policy = self.policy.tightened(ESCALATE_EVERYTHING)

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
    """Decides on texts between ``start`` and ``close``. unready: why it cannot, None if it can."""

    @property
    def unready(self) -> str | None: ...
    def start(self) -> None: ...
    async def close(self) -> None: ...


class Encoder:
    """In this process, with batches that grow with the load."""

    def __init__(
        self,
        loaded: Loaded,
        classifier: Classifier,
        rule: Rule,
        worked: Callable[[float], None] = lambda _: None,
    ) -> None:
        """worked: told after each batch how many seconds it took."""
        self._columns = loaded.bundle.columns
        self._inputs = Inputs(loaded.recipe.learner())
        self._classifier, self._rule = classifier, rule
        self._batcher = Batcher(self.decide, loaded.recipe.cascade.max_batch_size, worked)
        self.unready = None

    def start(self) -> None:
        self._batcher.start()

    async def close(self) -> None:
        await self._batcher.close()

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        return await self._batcher.submit(items)

    def decide(self, texts: Sequence[str]) -> list[Decision | Escalation]:
        """In the batcher's thread."""
        policy = self._rule.policy
        assert isinstance(policy, Policy)
        rows = self._inputs.all(unpacked(text, self._columns) for text in texts)
        return policy.decide_batch(self._classifier.logits(rows, _ROWS_A_PASS))


def classifier(loaded: Loaded) -> Classifier | None:
    """The student of this process, None where it writes; raises ModelError, BundleMismatch."""
    if isinstance(loaded.bundle, WrittenBundle):
        return None
    student = Classifier.load(loading.student_here(loaded), threads=STUDENT_CPUS)
    if student.labels != loaded.bundle.label_names:
        raise BundleMismatch(
            f"{loaded.student.path} answers with the labels {', '.join(student.labels)}, the "
            f"bundle with {', '.join(loaded.bundle.label_names)}. Run `journeyman certify`."
        )
    return student
