"""The promise, and serving under it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from journeyman.recipe.base import Count, Seconds, Section


class Certify(Section):
    """The promise that the escalation threshold carries."""

    guarantee: Literal["system_agreement", "selective_agreement"] = Field(
        "system_agreement",
        description="system_agreement: P(student answers and differs from the teacher) <= alpha. "
        "selective_agreement: P(differs | student answers) <= alpha.",
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="The promised rate.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Chance that the promise is broken by bad luck in the draw of rows."
    )
    max_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Certify rows that are used again (for another student, say) spend delta each "
        "time; once so much is spent they are refused.",
    )
    scores: tuple[Literal["max_probability", "margin", "entropy"], ...] = Field(
        ("max_probability", "margin", "entropy"),
        min_length=1,
        description="Confidence scores to choose from, on calibrate rows.",
    )

    @model_validator(mode="after")
    def _delta_fits(self) -> Certify:
        if self.delta > self.max_delta:
            raise ValueError(f"delta ({self.delta:g}) must not exceed max_delta "
                             f"({self.max_delta:g})")  # fmt: skip
        return self


class Cascade(Section):
    """Serving: the student answers what it may, the teacher the rest."""

    request_timeout_s: Seconds = Field(30.0, description="Deadline of one request.")
    max_batch_size: Count = Field(32, description="Rows that the student scores at a time.")
    max_queued_requests: Count = Field(
        512, description="Requests waiting for the teacher before further ones get 503."
    )
    teacher_cpus: Annotated[float, Field(ge=0)] = Field(1.0, description="Ray CPUs a teacher.")
    teacher_gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a teacher.")
