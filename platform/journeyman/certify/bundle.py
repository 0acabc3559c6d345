"""The policy bundle: what `certify` writes and `serve` refuses to start without.

Owns its schema, its digest and its one file. Deciding about a request is `cascade`'s.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from journeyman.certify.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, Calibrator
from journeyman.certify.certificate import GuaranteeKind
from journeyman.certify.chain import Chain
from journeyman.certify.confidence import Confidence
from journeyman.certify.curve import CurvePoint
from journeyman.certify.deferral_head import DeferralHead
from journeyman.certify.ledger import LedgerEntry
from journeyman.certify.mixture import Mixture
from journeyman.certify.parts import Guarantee as Guarantee
from journeyman.certify.parts import Part, Share, Stage, Stages, Text, check_head
from journeyman.certify.scores import ScoreName
from journeyman.certify.sequence_scores import SAMPLED, WrittenConfidence, WrittenScore
from journeyman.certify.thresholds import WrittenThreshold, read_threshold
from journeyman.errors import BundleMismatch
from journeyman.models import Model
from journeyman.recipe.serving import MOST_SAMPLES

SCHEMA_VERSION: Final = 1
BUNDLE_FILE = "bundle.json"


class Bundle(Part):
    """What any student is served under: what it was certified with, and what was promised."""

    schema_version: Literal[1] = SCHEMA_VERSION

    # What the promise holds for; serving compares them with what it has loaded.
    student: Text = Field(description="model reference of the student")
    teacher: Text = Field(description="model reference of the teacher")
    student_digest: Text
    teacher_digest: Text
    student_tokenizer_digest: Text
    teacher_tokenizer_digest: Text
    prompt_digest: Text

    columns: tuple[Text, ...] = Field(
        default=("text",), description="that a request must have; a text where it is `text` alone"
    )
    # Not written where it is not known: such a bundle's digest is as it was before.
    longest: int | None = Field(
        default=None,
        ge=1,
        exclude_if=lambda longest: longest is None,
        description="characters of the longest labeled row, over `columns`: what is longer is the "
        "teacher's, however sure the student is; left out: nothing is by its length",
    )
    threshold: WrittenThreshold = Field(
        description="the student answers strictly above it; null escalates everything"
    )

    # What is promised, and how it came about.
    served_guarantee: GuaranteeKind = Field(description="the one that `threshold` comes from")
    guarantees: tuple[Guarantee, ...] = Field(min_length=1)
    curve: tuple[CurvePoint, ...]
    student_accuracy: Share | None = Field(default=None, description="against gold, if any")
    teacher_accuracy: Share | None = Field(
        default=None, description="against gold, if any; of the mixture where there is one"
    )
    ledger: tuple[LedgerEntry, ...]
    recommendation: Text

    @cached_property
    def bundle_id(self) -> str:
        """Digest of the content; it names the bundle in every answer that serving gives."""
        return content_digest(self.model_dump(mode="json"))

    @property
    def served(self) -> Guarantee:
        """The guarantee that `threshold` comes from."""
        return next(g for g in self.guarantees if g.kind == self.served_guarantee)

    @property
    def accept_above(self) -> float:
        """`threshold` as a number to compare with; +inf escalates everything."""
        return read_threshold(self.threshold)

    @model_validator(mode="after")
    def _serves_what_it_promises(self) -> Self:
        served = [g for g in self.guarantees if g.kind == self.served_guarantee]
        if len(served) != 1 or len({g.kind for g in self.guarantees}) != len(self.guarantees):
            raise ValueError("`guarantees` must hold the served kind, and each kind once")
        if served[0].threshold != self.threshold:
            raise ValueError("`threshold` is not that of the served guarantee")
        return self


class PolicyBundle(Bundle):
    """Everything that serving needs to decide about a request, and what was promised for it."""

    # From a request to a decision.
    label_names: tuple[Text, ...] = Field(min_length=2, description="classes in logit order")
    score: ScoreName
    deferral_head: DeferralHead | None = Field(default=None, description="of that score alone")
    class_thresholds: tuple[float, ...] | None = Field(
        default=None,
        description="subtracted from the score by the student's answer; null if all share one",
    )
    temperature: float = Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    teacher_log_prior: tuple[float, ...] | None = Field(
        description="subtracted from the teacher's class log-probabilities; null if none"
    )
    mixture: Mixture | None = Field(
        default=None, description="what escalated requests are answered with; null: the teacher's"
    )
    class_guarantees: tuple[Guarantee, ...] | None = Field(
        default=None, description="of each of the student's answers, in logit order; null if none"
    )
    # Not written where there is one student: such a bundle's digest is as it was before.
    stages: Stages | None = Field(
        default=None,
        exclude_if=lambda stages: stages is None,
        description="several students, the bundle's own the last; `threshold` is then 0, of the "
        "score of whoever answers less its own threshold",
    )

    @property
    def chain(self) -> Chain:
        """How a row is scored, and by which student, as it was for the certificate."""
        if self.stages is not None:
            return Chain(confidences=tuple(one.confidence for one in self.stages.students))
        own = self.class_thresholds
        confidence = Confidence(
            calibrator=Calibrator(temperature=self.temperature),
            score=self.score,
            head=self.deferral_head,
            class_thresholds=None if own is None else np.array(own),
        )
        return Chain(confidences=(confidence,))

    @property
    def confidence(self) -> Confidence:
        """The bundle's own student's."""
        return self.chain.confidences[-1]

    @property
    def before(self) -> tuple[Stage, ...]:
        """The students that are asked before the bundle's own."""
        return () if self.stages is None else self.stages.students[:-1]

    @model_validator(mode="after")
    def _scores_as_it_says(self) -> Self:
        check_head(self.score, self.deferral_head)
        for name in ("class_thresholds", "class_guarantees"):
            of_classes = getattr(self, name)
            if of_classes is not None and len(of_classes) != len(self.label_names):
                raise ValueError(
                    f"`{name}` has {len(of_classes)} values for {len(self.label_names)} labels"
                )
        return self

    @model_validator(mode="after")
    def _ends_with_its_own_student(self) -> Self:
        if self.stages is None:
            return self
        last, answered = self.stages.students[-1], sum(s.n_accepted for s in self.stages.students)
        for name in ("student_digest", "student_tokenizer_digest", "score", "temperature"):
            if getattr(last, name) != getattr(self, name):
                raise ValueError(f"`{name}` is not that of the last of `stages`")
        if self.threshold not in (0.0, None) or answered != self.served.n_accepted:
            raise ValueError("`stages` are not those of the served guarantee")
        if self.class_thresholds or self.class_guarantees or self.mixture:
            raise ValueError("`stages` go with neither a promise of each answer nor a mixture")
        return self

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if len(set(self.label_names)) != len(self.label_names):
            raise ValueError("`label_names` names a class twice")
        prior = self.teacher_log_prior
        if prior is not None and len(prior) != len(self.label_names):
            raise ValueError(
                f"`teacher_log_prior` has {len(prior)} values for {len(self.label_names)} labels"
            )
        return self


class Samples(Part):
    """Answers that the student samples beside its greedy one, for its confidence in that."""

    n: int = Field(ge=1, le=MOST_SAMPLES)
    temperature: float = Field(gt=0)


class Rate(Part):
    """How often, and its exact two-sided 95% interval."""

    count: int = Field(ge=0)
    n: int = Field(ge=0)
    low: Share
    high: Share


class JudgeRecord(Part):
    """The model that said whether two answers mean the same, and how far it can be believed."""

    model: Text
    model_digest: Text
    prompt_digest: Text
    n_pairs: int = Field(ge=0, description="of answers, that it was asked about in both orders")
    false_agreement: Rate = Field(
        description="answers to different requests that it calls the same"
    )
    false_difference: Rate = Field(
        description="answers that differ in form alone that it calls different"
    )


class WrittenBundle(Bundle):
    """Of a student that writes: the promise is about its greedy answers to the certified prompt."""

    score: WrittenScore
    deferral_head: DeferralHead | None = Field(default=None, description="of learned scores alone")
    samples: Samples | None = Field(
        default=None, description="that the score takes of every request; null: it takes none"
    )
    match: Literal["exact", "parsed", "judge"] = Field(description="when two answers are the same")
    answer_pattern: Text | None = Field(description="whose group `answer` is compared, if any")
    judge: JudgeRecord | None = Field(
        default=None, description="of match judge, whose verdicts the promise is about"
    )
    max_tokens: int = Field(ge=1, description="of an answer, as certified")
    self_agreement: Share | None = Field(
        description="of the teacher's samples with its answer, where it gave several: no student "
        "can be promised to agree with it more often"
    )

    @property
    def confidence(self) -> WrittenConfidence:
        """How an answer is scored, as it was for the certificate."""
        return WrittenConfidence(score=self.score, head=self.deferral_head)

    @model_validator(mode="after")
    def _scores_as_it_says(self) -> Self:
        check_head(self.score, self.deferral_head)
        if (self.samples is None) == (self.score in SAMPLED):
            raise ValueError("`samples` must be there exactly where the `score` takes them")
        if (self.judge is None) == (self.match == "judge"):
            raise ValueError("`judge` must be there exactly where it is the `match`")
        return self


def of_models(student: Model, teacher: Model) -> dict[str, str]:
    """What a bundle says of the models that it was made for."""
    return {
        "student": student.reference,
        "teacher": teacher.reference,
        "student_digest": student.weights_digest,
        "teacher_digest": teacher.weights_digest,
        "student_tokenizer_digest": student.tokenizer_digest,
        "teacher_tokenizer_digest": teacher.tokenizer_digest,
    }


def folder_before(place: int) -> str:
    """Where in a bundle's folder the student lies that is asked at this place, from 0, before its
    own."""
    return f"before-{place + 1}"


def content_digest(content: Mapping[str, Any]) -> str:
    """128-bit BLAKE2b, hex, of canonical JSON: sorted keys, no spaces, no infinities."""
    canonical = json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return blake2b(canonical.encode(), digest_size=16).hexdigest()


def save(bundle: Bundle, directory: Path | str) -> Path:
    """Write the bundle as one file; a reader finds the old one or the new one, never half of it."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"bundle_id": bundle.bundle_id, **bundle.model_dump(mode="json")}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".bundle-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; a server often runs as someone else.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(folder / BUNDLE_FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(folder)
    return folder / BUNDLE_FILE


def load(directory: Path | str) -> PolicyBundle:
    """Read a classifier's bundle and check it against its own digest; BundleMismatch if anything
    is off."""
    bundle = load_any(directory)
    if not isinstance(bundle, PolicyBundle):
        raise BundleMismatch(
            f"{Path(directory) / BUNDLE_FILE} is of a student that writes, and this is for "
            "classifiers."
        )
    return bundle


def load_any(directory: Path | str) -> PolicyBundle | WrittenBundle:
    """Either kind; BundleMismatch as in ``load``."""
    path = Path(directory) / BUNDLE_FILE
    content = _read_content(path)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleMismatch(
            f"{path} has bundle schema version {version!r}, this Journeyman reads "
            f"{SCHEMA_VERSION}. Run `journeyman certify` again with this version."
        )
    written_id = content.pop("bundle_id", None)
    actual_id = content_digest(content)
    if written_id != actual_id:
        raise BundleMismatch(
            f"{path} was damaged or edited: it says bundle {written_id}, its content is "
            f"{actual_id}. A certificate does not survive an edit: run `journeyman certify` again."
        )
    try:
        kind = WrittenBundle if "match" in content else PolicyBundle
        return kind.model_validate(content)
    except ValidationError as error:
        raise BundleMismatch(
            f"{path} is not a policy bundle: {_first_complaint(error)}. "
            "Run `journeyman certify` again."
        ) from error


def _read_content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise BundleMismatch(
            f"There is no policy bundle at {path}. Run `journeyman certify`, or point serving at "
            "the directory that it wrote."
        ) from error
    except ValueError as error:
        raise BundleMismatch(
            f"{path} is not readable JSON ({error}): it was damaged or edited. "
            "Run `journeyman certify` again."
        ) from error
    if not isinstance(content, dict):
        raise BundleMismatch(
            f"{path} holds no JSON object: it was damaged or edited. "
            "Run `journeyman certify` again."
        )
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the bundle as a whole"
    return f"{where}: {first['msg']}"


def _sync_directory(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
