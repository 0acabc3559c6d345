"""Linear layers for answering on a CPU: by oneDNN, with weights that are laid out once.

torch multiplies by MKL, which lays the weights out anew in each call, and on CPUs that are not
Intel's leaves AVX-512 unused. A request is one short text, of which that is most of the time.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """What a float32 ``nn.Linear`` computes, to rounding; for inference alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        # No buffer: a packed tensor goes to no other device.
        self._packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), None
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return found

    def release(self) -> None:
        """Give back the memory of its weights."""
        self._packed = None


def pack(model: nn.Module) -> None:
    """Put packed layers in the place of a model's own, where this machine has them."""
    if platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                setattr(parent, name, PackedLinear(child))


def release(model: nn.Module) -> None:
    """Give back the memory of all packed weights."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.release()
