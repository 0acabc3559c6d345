"""Low-rank matrices that train in the weights' place, through the package ``peft``.

Knows what they are added to, and how they come out of it; not what trains them.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import files
from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student.architecture import first_line
from journeyman.student.checkpoints import LORA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAYERS = "layers.json"  # beside the matrices: which of the model's they are of


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
    """The model with matrices of ``student.lora`` in it; a classifier's head learns whole beside
    them. Raises ModelError."""
    lora = student.lora
    assert lora is not None
    check()
    peft = importlib.import_module("peft")
    causal = student.kind == "causal"
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        modules_to_save=None if causal else _heads(model),
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
    if causal and any(hasattr(module, "base_layer") for module in ends):
        raise ModelError(
            "student.lora.target_modules names the embeddings or the output projection, which the "
            "loss takes as they are; leave them out."
        )
    return adapted


def _heads(model: PreTrainedModel) -> list[str]:
    """Names of a classifier's layers that have learned nothing yet: what is on top of the encoder,
    and its pooler, as of ``models.parameter_groups``."""
    heads = [
        name
        for name, part in model.named_children()
        if part is not model.base_model and next(part.parameters(), None) is not None
    ]
    if getattr(model.base_model, "pooler", None) is not None:
        heads.append(f"{model.base_model_prefix}.pooler")
    return heads


def plain(model: Any) -> Any:
    """The ``transformers`` model that low-rank matrices, if any, were put in, with them in it."""
    return model.get_base_model() if is_adapted(model) else model


def merged(model: Any) -> PreTrainedModel:
    """The plain model, low-rank matrices added to its weights. ``model`` is used up by it."""
    return model.merge_and_unload() if is_adapted(model) else model


def write(model: Any, kept: Sequence[int], folder: Path) -> None:
    """Write what learns of an adapted model alone, for ``restore``; folder is new.

    kept: the layers that stayed of a model that was pruned: measured again, they might be others.
    """
    import torch

    # "auto" would ask the hub of a pruned model, which is none of there, whether embeddings grew.
    matrices = importlib.import_module("peft").get_peft_model_state_dict(
        model, save_embedding_layers=False
    )
    folder.mkdir(parents=True)
    torch.save(matrices, folder / LORA)
    if kept:
        files.write_json(folder / _LAYERS, {"kept": list(kept)})


def layers(folder: Path) -> list[int] | None:
    """Which ones the matrices in a checkpoint are of; None where none were left out."""
    path = folder / _LAYERS
    return files.read_json(path)["kept"] if path.exists() else None


def restore(model: Any, folder: Path) -> None:
    """Put what ``write`` wrote in the place of what ``adapted`` made."""
    import torch

    matrices = torch.load(folder / LORA)
    importlib.import_module("peft").set_peft_model_state_dict(model, matrices)


def is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
