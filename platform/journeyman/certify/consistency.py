"""Self-consistency of a student that writes: how often answers that it samples say what its greedy
one says (Wang et al. 2023, Self-Consistency Improves Chain of Thought Reasoning).

Owns how it is asked for samples, and what they say of an answer; by the same functions for a
certificate and for a request. No draw is seeded (a seed ends vLLM's CPU engine): what a certificate
rests on is the dataset of its samples, and a request's are further draws of the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.certify.matching import Same
from journeyman.certify.sequence_scores import self_consistency
from journeyman.labels import dataset
from journeyman.recipe import Generate, Rationales

if TYPE_CHECKING:
    from journeyman.certify.bundle import Samples
    from journeyman.probabilities import FloatArray

_WHOLE = r"(?s)\A(?P<answer>.*)\Z"  # a sample's text is its answer


def question(asked: Generate, samples: Samples) -> Rationales:
    """The same question to the student, to be answered so many times; asked: for its greedy answer.

    One request to the engine, which reads the prompt once. A row for which nothing was written in
    any sample has none, and none is too many.
    """
    shared = {n: getattr(asked, n) for n in Rationales.model_fields if hasattr(asked, n)}
    changes: dict[str, Any] = {
        "kind": "rationales", "samples": samples.n, "temperature": samples.temperature,
        "top_p": 1.0, "answer_pattern": _WHOLE, "max_quarantined": 1.0,
    }  # fmt: skip
    return Rationales.model_validate(shared | changes)


def read(labels: Path) -> dict[str, tuple[str, ...]]:
    """The samples of each row that has some, by its id."""
    table = dataset.read(labels).select(["id", "reasonings"])
    return {row["id"]: tuple(row["reasonings"]) for row in table.to_pylist()}


def agreements(
    answers: Sequence[str], drawn: Sequence[Sequence[str]], n_samples: int, same: Same
) -> FloatArray:
    """Share of an answer and its samples that say what the answer says: float64[n], in steps of
    1 / (n_samples + 1).

    drawn: of each answer; what lacks of ``n_samples`` says something else.
    """
    said = []
    for answer, samples in zip(answers, drawn, strict=True):
        agree = [same(sample, answer) for sample in samples]
        said.append([True, *agree, *[False] * (n_samples - len(agree))])
    return self_consistency(said)


def cost(samples: Samples | None) -> str:
    """What a bundle's score costs, as a sentence behind others; empty without samples."""
    if samples is None:
        return ""
    return (
        f" The student's confidence takes {samples.n} sampled answers beside its own, of every "
        "request; certify.samples: 0 does without."
    )
