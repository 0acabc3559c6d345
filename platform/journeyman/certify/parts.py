"""What a bundle is made of: promises as they are written, and students that are asked in turn."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from journeyman.certify.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, Calibrator
from journeyman.certify.certificate import Certificate, GuaranteeKind
from journeyman.certify.confidence import Confidence
from journeyman.certify.deferral_head import DeferralHead
from journeyman.certify.scores import ScoreName
from journeyman.certify.sequence_scores import LEARNED
from journeyman.certify.thresholds import WrittenThreshold, read_threshold, subtractable

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """Frozen, and nothing in it that is not named."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Guarantee(Part):
    """A certificate as it is written: `Certificate`'s fields, its threshold free of infinities."""

    kind: GuaranteeKind
    alpha: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    n: int = Field(ge=0)
    threshold: WrittenThreshold
    n_accepted: int = Field(ge=0)
    errors: int = Field(ge=0)
    upper_bound: Share
    k_star: int = Field(ge=-1)
    feasible: bool
    reason: str
    gains: int = Field(default=0, ge=0)

    @classmethod
    def from_certificate(cls, certificate: Certificate) -> Self:
        """Write down a certificate."""
        return cls(**asdict(certificate))

    @model_validator(mode="after")
    def _escalates_everything_if_infeasible(self) -> Self:
        if self.feasible == (self.threshold is None):
            raise ValueError("`threshold` must be null exactly where `feasible` is false")
        if not self.feasible and not self.reason:
            raise ValueError("`reason` must say why nothing is answered")
        return self


class Stage(Part):
    """One of several students that are asked in turn, and what came of it on `certify` rows."""

    student: Text = Field(description="model reference")
    student_digest: Text
    student_tokenizer_digest: Text
    text: Text = Field(description="template of what it reads")
    text_pair: Text | None = Field(default=None, description="and of what it reads beside that")
    score: ScoreName
    deferral_head: DeferralHead | None = Field(default=None, description="of that score alone")
    temperature: float = Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    threshold: WrittenThreshold = Field(
        description="it answers strictly above it; null passes everything on"
    )
    n_accepted: int = Field(ge=0, description="certify rows that it answers")
    errors: int = Field(ge=0, description="of these, how many otherwise than the teacher")
    cost: float = Field(gt=0, description="of one request that it is asked")
    guarantee: Guarantee | None = Field(
        default=None, description="its own, where each student has one"
    )

    @property
    def confidence(self) -> Confidence:
        """How a row is scored, less the threshold: it answers strictly above 0."""
        return Confidence(
            calibrator=Calibrator(temperature=self.temperature),
            score=self.score,
            head=self.deferral_head,
            threshold=subtractable(read_threshold(self.threshold)),
        )

    @model_validator(mode="after")
    def _scores_as_it_says(self) -> Self:
        check_head(self.score, self.deferral_head)
        return self


class Stages(Part):
    """Several students that are asked in turn, the bundle's own the last, and what that costs."""

    students: tuple[Stage, ...] = Field(min_length=2)
    teacher_cost: float = Field(gt=0, description="of one request")
    cost_unit: Literal["seconds", "given"] = Field(
        description="seconds a row as they were measured, or what certify.stage_costs says"
    )
    expected_cost: float = Field(gt=0, description="mean of a certify row, whoever answers it")


def check_head(score: str, head: DeferralHead | None) -> None:
    if (head is None) == (score in LEARNED):
        raise ValueError("`deferral_head` must be there exactly where the `score` is learned")
