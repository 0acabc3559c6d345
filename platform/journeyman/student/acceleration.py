"""Half precision and compiled code, where the recipe asks for them and the device has them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from journeyman.errors import ModelError

if TYPE_CHECKING:
    import torch


def autocast(
    device: torch.device, precision: Literal["auto", "fp32", "bf16"]
) -> AbstractContextManager[Any]:
    """Matrix products in bf16 where asked for; weights, losses and optimizer stay float32.

    auto: on GPUs that compute in bf16, and not on the CPU.
    """
    import torch

    wanted = precision == "bf16"
    if precision == "auto" and device.type == "cuda":
        wanted = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def compile_in_place(module: torch.nn.Module, device: torch.device) -> None:
    """Have torch.compile make code of ``module`` for batches of any shape, at its first calls.

    Parameters keep their names. Raises ModelError where torch.compile does not work at all.
    """
    import torch

    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:  # of torch's compiler, of Triton, of the C++ compiler
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"training.compile: torch.compile does not work here ({words[0]}); it needs a C++ "
            "compiler, on GPUs Triton too. Install them, or leave training.compile out."
        ) from error
    module.compile(dynamic=True)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).sum()
