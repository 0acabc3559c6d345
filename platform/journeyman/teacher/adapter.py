"""A teacher's LoRA adapter in its engine: one, which every request wears."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import adapters
from journeyman.errors import ModelError

if TYPE_CHECKING:
    import torch


def engine_arguments(folder: Path) -> dict[str, Any]:
    """vLLM's; it has room for some ranks only, and a smaller one leaves a part of it empty."""
    from vllm.config.lora import MaxLoRARanks

    rank, most = adapters.rank(folder), sorted(typing.get_args(MaxLoRARanks))
    if rank > most[-1]:
        raise ModelError(f"{folder}: an adapter of rank {rank}; vLLM takes {most[-1]} at most.")
    room = next(size for size in most if size >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def request(folder: Path | None) -> Any:
    """vLLM's LoRARequest, to go with each request; None without an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("teacher", 1, str(folder)) if folder else None


async def load(llm: Any, folder: Path) -> None:
    """Before the first request, which would take the engine down with it; raises ModelError."""
    try:
        await llm.add_lora(request(folder))
    except Exception as error:  # what vLLM hands on from its engine has this class
        reason = str(error).removeprefix("Call to add_lora method failed: ").splitlines()[0]
        raise ModelError(
            f"{folder}: vLLM cannot add this adapter to its model ({reason}); merge it (peft's "
            "merge_and_unload) and name the merged folder as teacher.model."
        ) from error


def take_over_logits(model: torch.nn.Module) -> None:
    """In a worker whose adapter is loaded: have its logits be right for any hidden states.

    vLLM 0.29 adds an adapter's part of the output layer by an index of the *sampled* tokens: for
    the positions of a prompt it is one of other rows, on a CPU an error. Here every row has the
    same adapter, so none is needed; and where the adapter leaves that layer alone, as most do,
    nothing is added at all.
    """
    from vllm.lora.layers import LogitsProcessorWithLoRA

    for module in model.modules():
        if isinstance(module, LogitsProcessorWithLoRA):
            module._get_logits = _Logits(module)


class _Logits:
    """In place of ``LogitsProcessorWithLoRA._get_logits``: the same contract."""

    def __init__(self, layer: Any) -> None:
        self._base = layer.base_layer
        # [rank, width] and [vocabulary, rank], the latter scaled when it was loaded.
        self._a, self._b = layer.lora_a_stacked[0, 0], layer.lora_b_stacked[0, 0]
        self._adds = bool(self._b.any())

    def __call__(
        self,
        hidden_states: torch.Tensor,
        lm_head: Any,
        embedding_bias: torch.Tensor | None = None,
        skip_gather: bool = False,
    ) -> torch.Tensor | None:
        """float[n, vocabulary]; hidden_states: float[n, width]; skip_gather: this worker's part
        of the vocabulary will do, which vLLM does not ask for where an adapter adds to it."""
        head = getattr(lm_head, "base_layer", lm_head)
        logits = self._base._get_logits(hidden_states, head, embedding_bias, skip_gather)
        if logits is None or not self._adds:
            return logits
        part = (hidden_states.to(self._a.dtype) @ self._a.T) @ self._b.T
        return logits.add_(part[:, : logits.shape[-1]])
