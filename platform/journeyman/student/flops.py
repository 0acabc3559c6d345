"""What a training step computes, and what share of a GPU's peak that is (MFU).

Useful work only, as in PaLM (Chowdhery et al. 2022, appendix B): forward and backward passes over
tokens that are there; no padding, nothing that activation checkpointing computes twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# Dense bf16 FLOP/s by a part of torch's name of the device, from the vendors' data sheets (without
# sparsity); the first that fits counts.
_PEAKS = (
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("MI300X", 1307e12),
    ("MI250X", 191.5e12),  # of one of its two dies
)


def peak(device_name: str) -> float | None:
    """bf16 FLOP/s of a device at best; None where it is not known."""
    words = device_name.replace("-", " ")
    return next((flops for part, flops in _PEAKS if f" {part} " in f" {words} "), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """FLOP of one training step on a row, by what they grow with."""

    per_token: float  # matrices that every token is multiplied with
    per_pair: float  # attention: of each two tokens of a row, in all layers
    per_learned: float = 0.0  # a language model's output projection

    def of(self, lengths: np.ndarray, learned: np.ndarray) -> float:
        """Of rows of int64[b] tokens, of which int64[b] are learned."""
        pairs = np.square(lengths.astype(np.float64)).sum()
        return float(
            self.per_token * lengths.sum()
            + self.per_pair * pairs
            + self.per_learned * learned.sum()
        )


def of_layers(backbone: Any, config: Any) -> Work | None:
    """Of a transformer's layers: embeddings are looked up, not multiplied.

    config: its text part. None where it names no attention heads, or others for each layer: a model
    of another make, whose work is not counted.
    """
    import torch

    names = ("num_attention_heads", "num_hidden_layers", "hidden_size")
    counts = [getattr(config, name, None) for name in names]
    heads, n_layers, hidden = (n if isinstance(n, int) else 0 for n in counts)
    if not (heads and n_layers and hidden):
        return None
    looked_up = {
        id(module.weight) for module in backbone.modules() if isinstance(module, torch.nn.Embedding)
    }
    matrices = (
        p
        for name, p in backbone.named_parameters()
        if p.dim() == 2 and id(p) not in looked_up and "pooler." not in name
    )
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    # Two products (scores, values), 2 FLOP for each multiplication, three times for a step.
    return Work(per_token=of_matrices(matrices), per_pair=12.0 * n_layers * width)


def of_matrices(matrices: Iterable[torch.Tensor]) -> float:
    """Of one token through matrices: 2 FLOP a weight forward, as many for the gradient of the
    input, and where the weight learns as many for its own."""
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices))
