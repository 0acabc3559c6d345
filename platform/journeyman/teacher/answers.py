"""What the teacher says of one row, by kind of label. Field names are columns of the dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class RowError(Exception):
    """A row that can never be labeled as it is; its class name is the kind of error."""


class ContextOverflow(RowError):  # noqa: N818 - the field's term
    """The prompt is longer than the teacher's context."""

    def __init__(self, n_tokens: int, limit: int) -> None:
        super().__init__(f"the prompt has {n_tokens} tokens, the teacher takes {limit}.")
        self.n_tokens = n_tokens


class EmptyTarget(RowError):  # noqa: N818
    """Nothing is left to score when the template is rendered."""


class Unparsable(RowError):  # noqa: N818
    """No sample of the teacher has an answer in the stated pattern."""


class Unrendered(RowError):  # noqa: N818
    """A template cannot be rendered for this row (of a null, say)."""


class InvalidRequest(RowError):  # noqa: N818
    """The engine refuses what it is asked of this row: it always will."""


class NotFinite(RowError):  # noqa: N818
    """The teacher's log-probabilities are no numbers for this row."""

    def __init__(self) -> None:
        super().__init__(
            "the teacher's log-probabilities are no numbers for this row: its activations run over "
            "in teacher.dtype, most likely; try float32 or bfloat16."
        )


class Refused(RowError):  # noqa: N818
    """An API says that this request can never be answered (400, content filter)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The teacher's distributions at consecutive positions, as captured.

    token_ids: int32[positions, k], sorted by falling log-probability, or true draws in the order
    drawn; logprobs: float32[positions, k], natural log, normalised over the whole vocabulary.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What every kind of label has: tokens spent, why it ended, whether its text was cut."""

    n_prompt_tokens: int
    n_output_tokens: int
    n_cached_tokens: int = 0  # of the prompt's, read from the engine's prefix cache
    finish_reason: str = "length"
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLabels(Answer):
    """The teacher's distribution over the classes for one row.

    class_logprobs: float32[c], natural log, normalised over the classes, before prior correction;
    label_mass: probability of any label word at all, None for channel scoring.
    """

    class_logprobs: np.ndarray
    label_mass: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitLabels(Answer):
    """Distributions over a given text.

    token_ids: int32[n], the text's tokens; recorded: of its last len(recorded) tokens, each given
    all before it (the first token has none where nothing stands in front of it).
    """

    token_ids: np.ndarray
    recorded: Recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedLabels(Answer):
    """An answer of the teacher's own, and the distribution at each of its tokens.

    token_ids: int32[n], the answer's tokens; recorded: one position each; output_logprob: sum of
    their log-probabilities, temperature 1. A teacher behind a URL gives neither of the last two.
    """

    output: str
    token_ids: np.ndarray
    output_logprob: float | None
    recorded: Recorded | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RationaleLabels(Answer):
    """Sampled reasonings and their answers.

    answers: one for each reasoning, None where it could not be parsed; answer: the majority's;
    reasoning: the first that gave it; agreement: its share of the samples, unparsable ones
    included; class_logprobs: float32[c], log of the mean over samples of P(class | reasoning).
    """

    reasonings: list[str]
    answers: list[str | None]
    answer: str
    reasoning: str
    agreement: float
    n_unparsed: int
    class_logprobs: np.ndarray | None
    label_mass: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One text that the teacher wrote.

    token_ids: int32[n]; token_logprobs: float32[n], of the tokens themselves at temperature 1;
    recorded: one position for each token, where it was asked for.
    """

    text: str
    token_ids: np.ndarray
    finish_reason: str
    token_logprobs: np.ndarray | None = None
    recorded: Recorded | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """What came of one request to generate: n completions, and the tokens it took in all."""

    completions: list[Completion]
    n_prompt_tokens: int
    n_output_tokens: int
    n_cached_tokens: int
    truncated: bool = False


# The columns behind these, per kind, are in labels.schema.
Labeled = ClassLabels | LogitLabels | GeneratedLabels | RationaleLabels
