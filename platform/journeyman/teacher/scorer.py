"""What tasks need of an engine, so that they know nothing of the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from journeyman.teacher.answers import Recorded, Spoken
from journeyman.teacher.prompting import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from journeyman.teacher.engine import Scored


class Scorer(Protocol):
    """See ``engine.Engine``."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def max_model_len(self) -> int: ...
    async def score_target(self, token_ids: Sequence[int], start: int) -> Scored: ...
    async def score_next(self, token_ids: Sequence[int], candidates: Sequence[int]) -> Scored: ...
    async def record_target(
        self, token_ids: Sequence[int], start: int, k: int, seed: int = 0
    ) -> tuple[Recorded, int]: ...
    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, n: int = 1, k: int | None = None
    ) -> Spoken: ...
