"""What every section of a recipe is made of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["train", "calibrate", "certify", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibrate", "certify", "test")

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Section):
    """How many of something there may be."""

    min: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


def differing_paths(one: object, other: object, path: str) -> Iterator[str]:
    """YAML paths of the settings that two JSON-like values do not have alike."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            yield from differing_paths(one.get(name), other.get(name), f"{path}.{name}")
    elif one != other:
        yield path


def digest(value: object) -> str:
    """128-bit BLAKE2b of a JSON-like value's canonical form, in hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def check_answer_pattern(pattern: str) -> None:
    """Raises ValueError unless it is a regular expression with a group ``answer``."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"answer_pattern is not a regular expression ({error})") from error
    if "answer" not in groups:
        raise ValueError("answer_pattern needs a group called answer: (?P<answer>...)")
