"""A worker's place among the others, and the ways in which they meet."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from journeyman.errors import JourneymanError
from journeyman.student import flops

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One of ``world_size`` data-parallel workers; all of them come to a meeting point."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def of_ray_train(cls) -> Place:
        """This process's, as one of Ray Train's workers; CPU cores are shared out on a node."""
        import torch
        from ray import train
        from ray.train.torch import get_device

        context = train.get_context()
        device = get_device()
        if device.type == "cpu":
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // context.get_local_world_size()))
        return cls(
            rank=context.get_world_rank(), world_size=context.get_world_size(), device=device
        )

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def peak_flops(self) -> float | None:
        """Of all workers' devices, taken to be alike, at best; None where it is not known."""
        if self.device.type != "cuda":
            return None
        import torch

        own = flops.peak(torch.cuda.get_device_name(self.device))
        return own and own * self.world_size

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of the ranks; a meeting point."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; a meeting point."""
        if self.world_size > 1:
            from torch import distributed

            distributed.all_reduce(value)
        return value

    def led(self, do: Callable[[], T]) -> T | JourneymanError:
        """What rank 0 gets from ``do``, or the error that it meets there; a meeting point."""
        found: T | JourneymanError | None = None
        if self.leads:
            try:
                found = do()
            except JourneymanError as error:
                found = error
        return self.gather(found)[0]
