"""How the workers hold the student that they train: each a whole copy of it (DDP), or each a part
of every tensor, with its gradient and its optimizer state (FSDP2).

A checkpoint is the same either way, whole tensors on the CPU, so that a run may go on the other
way, or with another number of workers.
"""

from __future__ import annotations

import contextlib
import copy
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from journeyman.student import lora, models
from journeyman.student.place import Place

if TYPE_CHECKING:
    import torch

State = dict[str, Any]  # an optimizer's ``state_dict``


class Holding(Protocol):
    """A student in training, as one worker holds it."""

    @property
    def module(self) -> torch.nn.Module:
        """What to call in training: gradients of it are means over the workers."""

    @property
    def together(self) -> bool:
        """Whether the calls below are meeting points, and so is each call of the student."""

    def in_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around one of a step's micro-batches; last: of the step."""

    def gradient_norm(self) -> float:
        """Of the last step, over all parameters; its gradients stay until the next step."""

    def scale_gradients(self, factor: float) -> None:
        """Of the last step."""

    def copy(self) -> torch.nn.Module:
        """The plain student with whole tensors, on the CPU; on rank 0. Of weights that do not
        learn there is no copy."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:
        """A copy with whole tensors, on the CPU; on rank 0."""

    def restore(self, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Put a state with whole tensors back."""


def hold(module: torch.nn.Module, place: Place, how: Literal["ddp", "fsdp"]) -> Holding:
    """Spread a plain student, still on the CPU, over the workers' devices; a meeting point.

    Make its optimizer afterwards: parameters may be others then.
    """
    module.train()
    if how == "fsdp" and place.world_size > 1:
        return _Parts(module, place)
    return _Copies(module.to(place.device), place)


class _Copies:
    """A whole copy on each worker."""

    together = False

    def __init__(self, module: torch.nn.Module, place: Place) -> None:
        self._own = self.module = module
        if place.world_size > 1:
            from torch.nn.parallel import DistributedDataParallel

            self.module = DistributedDataParallel(
                module,
                device_ids=[place.device] if place.device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # no second copy of the gradients
                # Only there: finding them takes a walk through each step's graph.
                find_unused_parameters=models.has_parts_beside_text(module),
            )

    def in_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the workers with a step's last micro-batch only."""
        if last or self.module is self._own:
            return contextlib.nullcontext()
        return self.module.no_sync()

    def gradient_norm(self) -> float:
        import torch

        gradients = [p.grad for p in self._own.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def scale_gradients(self, factor: float) -> None:
        _scale(self._own, factor)

    def copy(self) -> torch.nn.Module:
        copied: torch.nn.Module = models.copy_on_cpu(self._own)
        return copied

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:
        return _each(optimizer.state_dict(), lambda _, value: value.to("cpu", copy=True))

    def restore(self, optimizer: torch.optim.Optimizer, state: State) -> None:
        optimizer.load_state_dict(state)


class _Parts:
    """A part of every tensor on each worker; a layer is whole while it is computed.

    Gradients are averaged with each micro-batch: kept whole until a step's last one they would
    take the memory that is saved here.
    """

    together = True

    def __init__(self, module: torch.nn.Module, place: Place) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # A sharded module can be neither copied nor saved: keep its form, without its weights.
        self._form = models.copied(module, lambda weight: weight.to("meta"))
        self._adapted = any(map(lora.is_adapted, module.modules()))
        self._place = place
        mesh = init_device_mesh(place.device.type, (place.world_size,))
        for layer in _layers(module):
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        self.module = module

    def in_sync(self, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def gradient_norm(self) -> float:
        import torch

        squares = torch.zeros((), dtype=torch.float64, device=self._place.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                squares += parameter.grad.to_local().double().square().sum()
        return math.sqrt(self._place.total(squares).item())

    def scale_gradients(self, factor: float) -> None:
        _scale(self.module, factor)

    def copy(self) -> torch.nn.Module:
        import torch

        self.module.reshard()  # an evaluation leaves some tensors whole
        forms = dict(self._form.named_parameters())
        copies: dict[int, Any] = {}
        for name, part in self.module.named_parameters():
            if self._adapted and not part.requires_grad:
                continue  # of the model below low-rank matrices, which checkpoints leave out
            whole = self._whole(part.detach())
            if whole is not None:
                form = forms[name]
                copies[id(form)] = torch.nn.Parameter(whole, requires_grad=form.requires_grad)
        return copy.deepcopy(self._form, copies)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:
        return _each(optimizer.state_dict(), lambda _, value: self._whole(value))

    def restore(self, optimizer: torch.optim.Optimizer, state: State) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def part(number: int, value: torch.Tensor) -> torch.Tensor:
            of = parameters[number]
            if not isinstance(of, DTensor) or value.shape != of.shape:  # the number of steps
                return value
            whole = value.to(self._place.device)
            # Each worker has read the whole and keeps its part: nothing is sent.
            return distribute_tensor(whole, of.device_mesh, of.placements, src_data_rank=None)

        optimizer.load_state_dict(_each(state, part))

    def _whole(self, value: torch.Tensor) -> torch.Tensor | None:
        """A copy on the CPU; of rank 0 alone, though all must call."""
        from torch.distributed.tensor import DTensor

        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.to("cpu", copy=True) if self._place.leads else None


def _scale(module: torch.nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _each(state: State, do: Any) -> State:
    """An optimizer's state with each tensor changed, which ``do`` gets with its parameter's
    number."""
    return {
        "state": {
            number: {name: do(number, value) for name, value in of_one.items()}
            for number, of_one in state["state"].items()
        },
        "param_groups": copy.deepcopy(state["param_groups"]),
    }


def _layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """A transformer's layers, as the architecture names what must not be taken apart."""
    import torch

    names = {n for m in module.modules() for n in (getattr(m, "_no_split_modules", None) or ())}
    return [
        layer
        for stack in module.modules()
        if isinstance(stack, torch.nn.ModuleList)
        for layer in stack
        if type(layer).__name__ in names
    ]
