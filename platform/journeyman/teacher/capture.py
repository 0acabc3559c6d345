"""vLLM's request outputs to numpy: the one place that knows the shape of its logprobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


def target_logprobs(output: RequestOutput, start: int) -> np.ndarray:
    """log P(token | tokens before it) of a prompt's tokens from ``start`` on.

    The request had ``prompt_logprobs=0`` and ``flat_logprobs=True``: one entry for each
    position but the first. Returns float32[n_prompt - start], natural log; start >= 1.
    """
    flat = output.prompt_logprobs
    return np.asarray(flat.logprobs[start - 1 :], dtype=np.float32)


def next_token_logprobs(output: RequestOutput, n_tokens: int) -> np.ndarray:
    """Log-probabilities of the ``logprob_token_ids`` at the first generated position.

    vLLM puts the sampled token first and the asked ones behind it, in the order asked.
    Returns float32[n_tokens], natural log, normalised over the whole vocabulary.
    """
    flat = output.outputs[0].logprobs
    return np.asarray(flat.logprobs[1 : 1 + n_tokens], dtype=np.float32)
