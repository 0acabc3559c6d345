"""Who answers where the student writes: its answer and how likely its tokens were go in, that
answer or an escalation comes out.

The same for these as ``policy`` is for classes. Knows nothing of engines, queues or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from journeyman.cascade.policy import Decision, Escalation, Written
from journeyman.certify import consistency
from journeyman.certify.bundle import WrittenBundle
from journeyman.certify.sequence_scores import WrittenConfidence
from journeyman.teacher.answers import ClassLabels

_NO_CLASSES = np.empty(0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WrittenPolicy:
    """A bundle's rule. accept_above: the student answers strictly above; +inf escalates all; same:
    whether two answers are one, as it was for the certificate; n_samples: of each text, that the
    confidence takes."""

    confidence: WrittenConfidence
    accept_above: float
    same: Callable[[str, str], bool]
    n_samples: int = 0

    @classmethod
    def from_bundle(cls, bundle: WrittenBundle, same: Callable[[str, str], bool]) -> WrittenPolicy:
        return cls(
            confidence=bundle.confidence,
            accept_above=bundle.accept_above,
            same=same,
            n_samples=bundle.samples.n if bundle.samples else 0,
        )

    def tightened(self, accept_above: float) -> WrittenPolicy:
        """The same rule with a stricter threshold; never with a looser one."""
        return replace(self, accept_above=max(self.accept_above, accept_above))

    def decide_batch(self, said: Sequence[Written | None]) -> list[Decision | Escalation]:
        """said: the student's answers, None where it has none: that text is the teacher's, as it
        was when it counted as different for the certificate."""
        answered = [one for one in said if one is not None and len(one.logprobs)]
        scores = iter(self._scores(answered))
        decisions: list[Decision | Escalation] = []
        for one in said:
            if one is None or not len(one.logprobs):
                decisions.append(Escalation(student=None))
                continue
            answer = _decision("student", one, next(scores))
            accepted = answer.confidence is not None and answer.confidence > self.accept_above
            decisions.append(answer if accepted else Escalation(student=answer))
        return decisions

    def is_answer(self, said: ClassLabels | Written) -> bool:
        return isinstance(said, Written)

    def escalated(self, said: ClassLabels | Written, student: Decision | None) -> Decision:
        """What a text is answered with that the student does not answer."""
        assert isinstance(said, Written)
        return _decision("teacher", said, student.confidence if student else None)

    def _scores(self, answered: Sequence[Written]) -> list[float]:
        if not answered:
            return []
        logprobs = np.concatenate([one.logprobs for one in answered])
        agreements = None
        if self.n_samples:
            said, drawn = [one.text for one in answered], [one.samples for one in answered]
            agreements = consistency.agreements(said, drawn, self.n_samples, self.same)
        scores: list[float] = self.confidence.of(
            logprobs, [len(one.logprobs) for one in answered], agreements
        ).tolist()
        return scores


def _decision(by: str, said: Written, confidence: float | None) -> Decision:
    return Decision(
        answered_by="student" if by == "student" else "teacher",
        label=said.text,
        confidence=confidence,
        probabilities=_NO_CLASSES,
        written=said,
    )
