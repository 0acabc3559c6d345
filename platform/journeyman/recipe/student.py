"""The small model, and how it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from journeyman.recipe.base import Count, Section, Share


class Student(Section):
    """The small model that learns."""

    model: str = Field(
        description="Pretrained encoder: hub id, local folder or package://NAME/RESOURCE."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    kind: Literal["classifier"] = Field("classifier", description="classifier: an encoder.")
    max_length: Count = Field(128, description="Longest input in tokens; longer ones are cut.")


class Training(Section):
    """How the student is trained: Ray Train, DDP."""

    workers: Count = Field(1, description="Data-parallel workers.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1.0, description="Ray CPUs a worker.")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a worker.")
    epochs: Count = Field(4, description="Passes over the train rows.")
    batch_size: Count = Field(32, description="Rows of one optimizer step, over all workers.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-5, description="Of the encoder.")
    head_learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Of the head.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW weight decay.")
    warmup: Share = Field(0.1, description="Share of the steps with a rising learning rate.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Softens both distributions in the loss (Hinton et al. 2015)."
    )
    gold_weight: Share = Field(
        0.0, description="Weight of cross-entropy on gold labels, for rows that have one."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        2, description="Worker failures from which a run restarts at its last checkpoint."
    )
    seed: int = Field(0, description="Of row order and of the head's first weights.")

    @model_validator(mode="after")
    def _batch_divides(self) -> Training:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of workers ({self.workers})"
            )
        return self
