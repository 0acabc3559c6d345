"""Kind ``rationales``: sampled reasonings, the majority's answer, classes given the reasoning.

Self-consistency: Wang et al. 2023, "Self-Consistency Improves Chain of Thought Reasoning in
Language Models".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from journeyman.recipe import Rationales
from journeyman.teacher.answers import RationaleLabels, Unparsable
from journeyman.teacher.classes import normalised, phrases, score_phrases
from journeyman.teacher.prompting import Encoder, with_more
from journeyman.teacher.scorer import Scorer
from journeyman.teacher.tokens import LocalSpeaker, Speaker, sampling_of

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class RationaleTask:
    """n reasonings of a row; with ``classes``, each label scored behind each reasoning."""

    def __init__(self, labels: Rationales, speaker: Speaker, engine: Scorer | None) -> None:
        """engine: for the second pass, where there is one."""
        self._labels = labels
        self._speaker = speaker
        self._sampling = sampling_of(labels)
        self._pattern = re.compile(labels.answer_pattern)
        self.requests_per_row = labels.samples
        self._second_pass = None
        if labels.classes and engine is not None and isinstance(speaker, LocalSpeaker):
            self._second_pass = _SecondPass(labels, speaker, engine)

    async def run(self, row: Mapping[str, Any], seed: int = 0) -> RationaleLabels:
        spoken = await self._speaker.speak(row, self._sampling, self._labels.samples, None)
        texts = [completion.text for completion in spoken.completions]
        found = [parse(text, self._pattern, self._labels.number) for text in texts]
        answers = [answer for answer, _ in found]
        winner = majority(answers)
        if winner is None:
            raise Unparsable(
                f"none of {len(texts)} samples has an answer as labels.answer_pattern states it; "
                f"the first ends with {texts[0][-80:]!r}."
            )
        chosen = answers.index(winner)
        distribution, mass, n_prompt, n_output, n_cached = None, None, 0, 0, 0
        if self._second_pass:
            reasonings = [text[:end] for text, (a, end) in zip(texts, found, strict=True)
                          if a is not None]  # fmt: skip
            (distribution, mass), n_prompt, n_output, n_cached = await self._second_pass.run(
                row, reasonings
            )
        return RationaleLabels(
            reasonings=texts,
            answers=answers,
            answer=winner,
            reasoning=texts[chosen],
            agreement=answers.count(winner) / len(answers),
            n_unparsed=answers.count(None),
            class_logprobs=distribution,
            label_mass=mass,
            n_prompt_tokens=spoken.n_prompt_tokens + n_prompt,
            n_output_tokens=spoken.n_output_tokens + n_output,
            n_cached_tokens=spoken.n_cached_tokens + n_cached,
            finish_reason=spoken.completions[chosen].finish_reason,
            truncated=spoken.truncated,
        )

    def prefix(self, row: Mapping[str, Any]) -> str:
        return self._speaker.prefix(row)


class _SecondPass:
    """P(class | prompt, reasoning), by prefill of each label's words behind the reasoning."""

    def __init__(self, labels: Rationales, speaker: LocalSpeaker, engine: Scorer) -> None:
        self._engine = engine
        self._prompting = speaker.prompting
        self._phrases = phrases(engine.tokenizer, labels.classes)
        self._answer_prompt = labels.answer_prompt
        longest = max(len(phrase) for phrase in self._phrases)
        self._encoder = Encoder(
            engine.tokenizer, engine.max_model_len - 1 - longest, labels.overflow
        )

    async def run(
        self, row: Mapping[str, Any], reasonings: Sequence[str]
    ) -> tuple[tuple[np.ndarray, float], int, int, int]:
        """float32[c], log of the mean over reasonings of P(class | reasoning), and the mean mass
        of all label words; tokens of the prompts, of the outputs, and from the cache."""
        rendered = self._prompting.render(row, tokenizer=self._encoder.tokenizer)
        distributions, masses, n_prompt, n_cached = [], [], 0, 0
        for reasoning in reasonings:
            behind = with_more(rendered, (reasoning, True), (self._answer_prompt, False))
            prompt, _ = await self._encoder.fit_soon(behind)
            loglik, cached = await score_phrases(self._engine, prompt, self._phrases)
            logprobs, log_mass = normalised(loglik)
            distributions.append(logprobs.astype(np.float64))
            masses.append(float(np.exp(log_mass)))
            n_prompt += sum(len(prompt) + len(phrase) for phrase in self._phrases)
            n_cached += cached
        mean = np.logaddexp.reduce(np.array(distributions), axis=0) - np.log(len(distributions))
        n_output = len(reasonings) * len(self._phrases)
        return (mean.astype(np.float32), float(np.mean(masses))), n_prompt, n_output, n_cached


def parse(text: str, pattern: re.Pattern[str], number: bool) -> tuple[str | None, int]:
    """The last match's answer, None where there is none, and where that match begins."""
    last = None
    for match in pattern.finditer(text):
        last = match
    if last is None or last.group("answer") is None:
        return None, len(text)
    answer = last.group("answer").strip()
    return (as_number(answer) if number else answer) or None, last.start()


def as_number(answer: str) -> str | None:
    """The last number in an answer in one form: ``$1,000.00`` as ``1000``."""
    found = _NUMBER.findall(answer)
    if not found:
        return None
    text = found[-1].replace(",", "")
    return text.rstrip("0").rstrip(".") if "." in text else text


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; of equally frequent ones the first."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=lambda answer: counts[answer]) if counts else None
