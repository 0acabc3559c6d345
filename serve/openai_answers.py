"""An answer of the cascade as OpenAI's clients read one: its text, its tokens, why it ended."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from journeyman.cascade.policy import Decision, Written
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from journeyman.teacher.pieces import fitted
from serve.openai_schema import ChatRequest, CompletionRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Of one choice.

    ranked: alternatives at each token, the one said first, with their log-probabilities: all
    labels, or the token alone where it was written. whole: not cut.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    whole: bool
    ranked: list[list[tuple[str, float]]]

    def chat_logprobs(self, top: int) -> dict[str, Any]:
        content = []
        for alternatives in self.ranked:
            said = [
                {"token": token, "logprob": logprob, "bytes": list(token.encode())}
                for token, logprob in alternatives
            ]
            content.append({**said[0], "top_logprobs": said[:top]})
        return {"content": content, "refusal": None}

    def text_logprobs(self, top: int) -> dict[str, Any]:
        lengths = (len(alternatives[0][0]) for alternatives in self.ranked)
        return {
            "tokens": [alternatives[0][0] for alternatives in self.ranked],
            "token_logprobs": [alternatives[0][1] for alternatives in self.ranked],
            "top_logprobs": [dict(alternatives[:top]) for alternatives in self.ranked],
            "text_offset": list(itertools.accumulate(lengths, initial=0))[:-1],
        }


def said(
    decision: Decision,
    bundle: PolicyBundle | WrittenBundle,
    request: ChatRequest | CompletionRequest,
) -> Said:
    """What is sent of a decision."""
    text = request.cut(decision.label)
    if decision.written is not None:
        return _written(decision.written, text, request.limit)
    assert isinstance(bundle, PolicyBundle)
    ranked = [_labels(decision, bundle)]  # a label is one token, whatever is cut of it
    whole = text == decision.label
    return Said(text=text, finish_reason="stop", whole=whole, ranked=ranked)


def _labels(decision: Decision, bundle: PolicyBundle) -> list[tuple[str, float]]:
    """Labels and their log-probabilities, the likeliest first."""
    logprobs = np.log(np.maximum(decision.probabilities, np.finfo(np.float64).tiny))
    order = np.argsort(-logprobs, kind="stable")
    return [(bundle.label_names[i], float(logprobs[i])) for i in order]


def _written(written: Written, text: str, limit: int | None) -> Said:
    finish_reason: Literal["stop", "length"] = written.finish_reason
    if len(text) < len(written.text):
        finish_reason = "stop"
    tokens = fitted(written.tokens, written.text)
    if limit is not None and limit < len(tokens):
        within = "".join(tokens[:limit])
        if len(within) < len(text):
            text, finish_reason = text[: len(within)], "length"
    sent = fitted(tokens, text)
    logprobs = written.logprobs[: len(sent)].tolist()  # none, where the tokens were drawn
    return Said(
        text=text,
        finish_reason=finish_reason,
        whole=text == written.text,
        ranked=[[pair] for pair in zip(sent[: len(logprobs)], logprobs, strict=True)],
    )
