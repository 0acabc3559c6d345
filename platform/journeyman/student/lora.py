"""Low-rank matrices that train in the weights' place, through the package ``peft``.

Knows what they are added to, and how they come out of it; not what trains them.
"""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student.architecture import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check() -> None:
    """Raises ModelError where ``peft`` is not installed."""
    try:
        # By name: an optional package, which type checkers may not find.
        importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(
            f"student.lora needs the package peft ({first_line(error)}) on {platform.node()}, as "
            "on every node that trains and where the run is started, which merges the matrices at "
            "the end; pip install 'journeyman[lora]'."
        ) from error


def adapted(model: PreTrainedModel, student: Student, folder: Path) -> Any:
    """The model with matrices of ``student.lora`` in it; raises ModelError."""
    lora = student.lora
    assert lora is not None
    check()
    peft = importlib.import_module("peft")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else "all-linear",
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(
            f"{folder}: peft cannot adapt it with student.lora ({first_line(error)}); check "
            "student.lora.target_modules."
        ) from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(hasattr(module, "base_layer") for module in ends):
        raise ModelError(
            "student.lora.target_modules names the embeddings or the output projection, which the "
            "loss takes as they are; leave them out."
        )
    return adapted


def merged(model: Any) -> PreTrainedModel:
    """The plain model, low-rank matrices added to its weights. ``model`` is used up by it."""
    return model.merge_and_unload() if is_adapted(model) else model


def adapter(model: Any) -> dict[str, Any] | None:
    """The low-rank matrices by name, for ``restore``; None without LoRA."""
    if not is_adapted(model):
        return None
    return importlib.import_module("peft").get_peft_model_state_dict(model)


def restore(model: Any, matrices: dict[str, Any]) -> None:
    """Put the low-rank matrices of a checkpoint in the place of those that ``build`` made."""
    importlib.import_module("peft").set_peft_model_state_dict(model, matrices)


def is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
