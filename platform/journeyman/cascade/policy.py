"""Who answers: a student's logits in, its answer or an escalation out.

Owns the rule that a bundle carries. Computes as certification did, by the same functions, so that
the promise holds for what is served. Knows nothing of models, queues or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.chain import Chain
from journeyman.certify.confidence import Confidence
from journeyman.certify.mixture import Mixture
from journeyman.errors import DataError
from journeyman.labels.prior import corrected
from journeyman.probabilities import FloatArray
from journeyman.teacher.answers import ClassLabels

AnsweredBy = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """What a model wrote for one text.

    tokens: those of ``text``, as text, empty where they are not known (of the answer that most
    samples gave, say); logprobs: float64[t], of each token written, the one that ended the answer
    included, at temperature 1 and rounded as a label dataset stores them; samples: further answers
    to the same text, where the student's confidence takes some.
    """

    text: str
    tokens: tuple[str, ...]
    logprobs: FloatArray
    finish_reason: Literal["stop", "length"]
    n_prompt_tokens: int
    n_output_tokens: int
    samples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """One text's answer.

    label: the class, or what was written; confidence: the student's score, None if it was not
    asked, or is nothing to go by; probabilities: float64[c], of who answered (of the mixture, where
    the bundle has one and the teacher was asked), in the order of the bundle's label names, of
    classes; written: of students that write; stage: of several students the one that answered,
    counted from 1; said: of a text that the teacher was asked about, its own distribution over
    classes as labeling has it.
    """

    answered_by: AnsweredBy
    label: str
    confidence: float | None
    probabilities: FloatArray
    written: Written | None = None
    stage: int | None = None
    said: ClassLabels | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Escalation:
    """The student is not confident enough; ``student`` is what it would have answered, None where
    it has no answer."""

    student: Decision | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """A bundle's rule. accept_above: the student answers strictly above; +inf escalates all;
    before: how students are scored that are asked before the one with this confidence."""

    label_names: tuple[str, ...]
    confidence: Confidence
    accept_above: float
    teacher_log_prior: FloatArray | None
    mixture: Mixture | None = None
    before: tuple[Confidence, ...] = ()

    @classmethod
    def from_bundle(cls, bundle: PolicyBundle) -> Policy:
        prior = bundle.teacher_log_prior
        return cls(
            label_names=bundle.label_names,
            confidence=bundle.confidence,
            accept_above=bundle.accept_above,
            teacher_log_prior=None if prior is None else np.array(prior, dtype=np.float64),
            mixture=bundle.mixture,
            before=bundle.chain.confidences[:-1],
        )

    def tightened(self, accept_above: float) -> Policy:
        """The same rule with a stricter threshold; never with a looser one."""
        return replace(self, accept_above=max(self.accept_above, accept_above))

    def decide(self, student_logits: npt.ArrayLike) -> Decision | Escalation:
        """student_logits: float[c] of one text."""
        return self.decide_batch(np.asarray(student_logits)[None])[0]

    def decide_batch(
        self, student_logits: npt.ArrayLike, stage: int = -1
    ) -> list[Decision | Escalation]:
        """student_logits: float[n, c]; raises DataError if they do not fit the labels.

        stage: whose they are, of several students; the last one's by default.
        """
        logits = np.asarray(student_logits)
        if logits.ndim == 2 and logits.shape[1] != len(self.label_names):
            raise DataError(
                f"The student gives {logits.shape[1]} logits a text, the bundle names "
                f"{len(self.label_names)} labels. Serve the student that the bundle was made for."
            )
        chain = self._chain.confidences
        probabilities, confidence = chain[stage].of(logits)
        place = stage % len(chain) + 1 if self.before else None
        answers = [
            self._decision("student", row, float(value), place)
            for row, value in zip(probabilities, confidence, strict=True)
        ]
        accepted = confidence > self.accept_above
        return [
            answer if accept else Escalation(student=answer)
            for answer, accept in zip(answers, accepted, strict=True)
        ]

    def goes_on(self, decided: Decision | Escalation, stage: int) -> bool:
        """Whether the next of several students is asked, rather than the teacher. What this one
        would answer but for a stricter threshold of the audits is the teacher's."""
        if isinstance(decided, Decision) or decided.student is None:
            return False
        confidence = decided.student.confidence
        return confidence is not None and bool(self._chain.goes_on(confidence, stage))

    @property
    def _chain(self) -> Chain:
        return Chain(confidences=(*self.before, self.confidence))

    def is_answer(self, said: ClassLabels | Written) -> bool:
        """Whether it is a distribution over the labels."""
        if not isinstance(said, ClassLabels):
            return False
        logprobs = np.asarray(said.class_logprobs)
        return logprobs.shape == (len(self.label_names),) and bool(np.isfinite(logprobs).all())

    def escalated(self, said: ClassLabels | Written, student: Decision | None) -> Decision:
        """What a text is answered with that the student does not answer."""
        assert isinstance(said, ClassLabels)
        return replace(self.teacher_decision(said.class_logprobs, student), said=said)

    def same(self, one: str, other: str) -> bool:
        """Whether two answers are one."""
        return one == other

    def teacher_decision(
        self, class_logprobs: npt.ArrayLike, student: Decision | None = None
    ) -> Decision:
        """class_logprobs: float[c] of one text, before prior correction, as labeling has them.

        student: what it said, where it was asked first; its opinion counts if the bundle mixes,
        and if it is one on a text like those that were certified.
        """
        probabilities = np.exp(corrected(np.asarray(class_logprobs), self.teacher_log_prior))
        if self.mixture and student and student.confidence is not None:
            mixed = self.mixture.of(student.probabilities[None], probabilities[None])
            probabilities = mixed[0]
        return self._decision("teacher", probabilities, student.confidence if student else None)

    def _decision(
        self,
        answered_by: AnsweredBy,
        probabilities: FloatArray,
        confidence: float | None,
        stage: int | None = None,
    ) -> Decision:
        return Decision(
            answered_by=answered_by,
            label=self.label_names[int(probabilities.argmax())],
            confidence=confidence,
            probabilities=probabilities,
            stage=stage,
        )


def beyond(decided: Decision | Escalation) -> Escalation:
    """Of a text that is outside of what was certified: the teacher's, whatever the student says. No
    score of such a text was ever tested, so it has none, for the watch over the promise neither."""
    student = decided.student if isinstance(decided, Escalation) else decided
    return Escalation(student=student and replace(student, confidence=None))


def student_answers(decisions: Sequence[Decision | Escalation]) -> list[Decision | None]:
    """What the student says of each text, whether it may answer or not; None: nothing."""
    return [d.student if isinstance(d, Escalation) else d for d in decisions]
