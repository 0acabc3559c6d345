"""vLLM's log-probabilities to numpy, with no Python object for any of them.

The one place that knows the shapes in which vLLM hands them over. Its front end turns the arrays
that it gets from the engine core into objects (5 to 26 us a position); ``ArrayLogprobs`` keeps them
as they are (0.1 us). Where that class is not the one it was written for, flat log-probabilities are
asked for instead, and give the same arrays, slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.teacher.answers import Recorded
from journeyman.teacher.progress import counting
from journeyman.teacher.worker import START, WRITTEN_FOR

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

OURS = "journeyman"  # extra_args: keep this request's arrays


def install() -> bool:
    """Let vLLM's front end in this process keep arrays for requests marked ``OURS``.

    Returns whether it does; other requests are treated as before.
    """
    import vllm
    from vllm.v1.engine import logprobs, output_processor

    if not vllm.__version__.startswith(WRITTEN_FOR):
        return False
    stock = logprobs.LogprobsProcessor
    if output_processor.LogprobsProcessor is not stock:
        return True  # installed before

    class ArrayLogprobs(stock):  # type: ignore[misc, valid-type]
        """Keeps each step's arrays in a list, and counts its tokens."""

        counting = None

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            params = request.sampling_params
            if not (params.extra_args or {}).get(OURS):
                return stock.from_new_request(tokenizer, request)
            kept = cls(
                tokenizer=None,
                logprobs=None if params.num_logprobs is None else [],
                prompt_logprobs=None if params.prompt_logprobs is None else [],
                cumulative_logprob=None,
                num_logprobs=params.num_logprobs,
                num_prompt_logprobs=params.prompt_logprobs,
            )
            kept.counting = counting.get()  # this runs in the task that asks
            return kept

        def update_from_output(self, output: Any) -> None:
            if self.counting is not None:
                self.counting.came(len(output.new_token_ids))
            if output.new_logprobs is not None:
                self.logprobs.append(output.new_logprobs)
            if output.new_prompt_logprobs_tensors is not None:
                self.prompt_logprobs.append(output.new_prompt_logprobs_tensors)

    output_processor.LogprobsProcessor = ArrayLogprobs
    return True


def target(output: RequestOutput, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the prompt's tokens from ``start`` on: int32 ids and float32 log-probabilities, both
    [positions, 1 + k]; the token's own stands first, the k asked for behind it."""
    ids, values = _prompt_arrays(output.prompt_logprobs)
    n_positions = len(output.prompt_token_ids) - start
    return ids[len(ids) - n_positions :], values[len(values) - n_positions :]


def target_logprobs(output: RequestOutput, start: int) -> np.ndarray:
    """float32[n_prompt - start]: log P(token | tokens before it) from ``start`` on."""
    return target(output, start)[1][:, 0]


def next_token_logprobs(output: RequestOutput, n_tokens: int) -> np.ndarray:
    """float32[n_tokens]: of the ``logprob_token_ids`` at the first generated position, in the
    order asked; vLLM puts the sampled token in front of them."""
    return generated(output.outputs[0])[1][0, 1 : 1 + n_tokens]


def generated(completion: CompletionOutput) -> tuple[np.ndarray, np.ndarray]:
    """Of a completion's tokens: as ``target``, the sampled token's own first."""
    return _sample_arrays(completion.logprobs)


def recorded(ids: np.ndarray, values: np.ndarray) -> Recorded:
    """The entries behind the token's own."""
    return Recorded(
        token_ids=np.ascontiguousarray(ids[:, 1:]), logprobs=np.ascontiguousarray(values[:, 1:])
    )


def marks(start: int | None = None) -> dict[str, Any]:
    """extra_args of a request whose arrays are to be kept."""
    return {OURS: True} | ({} if start is None else {START: start})


def _prompt_arrays(kept: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(kept, list):
        return _flat_arrays(kept)
    # One tensor for each chunk of a chunked prefill on some runners, one for all on others.
    return (
        _joined([step.logprob_token_ids.numpy() for step in kept]),
        _joined([step.logprobs.numpy() for step in kept]),
    )


def _sample_arrays(kept: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(kept, list):
        return _flat_arrays(kept)
    # A step has as many entries as any request in its batch asked for, so some have more.
    width = min(step.logprobs.shape[1] for step in kept)
    return (
        _joined([step.logprob_token_ids[:, :width] for step in kept]),
        _joined([step.logprobs[:, :width] for step in kept]),
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _flat_arrays(flat: Any) -> tuple[np.ndarray, np.ndarray]:
    """A FlatLogprobs; the first position of a prompt has none."""
    filled = [i for i, begin in enumerate(flat.start_indices) if flat.end_indices[i] > begin]
    shape = (len(filled), -1)
    return (
        np.asarray(flat.token_ids, dtype=np.int32).reshape(shape),
        np.asarray(flat.logprobs, dtype=np.float32).reshape(shape),
    )
