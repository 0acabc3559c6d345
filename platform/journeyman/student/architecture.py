"""What ``transformers`` knows of a folder before its weights are read: its config, as a causal
language model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.errors import ModelError
from journeyman.student.models import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder)
    except unreadable() as error:
        raise no_language_model(folder, error) from error
    if config.is_encoder_decoder:
        raise ModelError(
            f"{folder}: {config.model_type} is an encoder-decoder model; student.model must name "
            "a causal one, which is a decoder only."
        )
    return config


def unreadable(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What ``transformers`` raises for folders and configs that it cannot make a model of."""
    from huggingface_hub.errors import StrictDataclassError

    return (OSError, ValueError, KeyError, TypeError, StrictDataclassError, *more)


def no_language_model(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{folder}: transformers cannot make a language model of it ({first_line(error)}); "
        "student.model must name a causal one."
    )


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def by_layer(values: dict[str, Any], n_layers: int, chosen: Sequence[int]) -> dict[str, Any]:
    """The config's lists that have a value for each layer, for the layers chosen."""
    return {
        name: [value[i] for i in chosen]
        for name, value in values.items()
        if isinstance(value, list) and len(value) == n_layers
        if name != "architectures" and not name.endswith(("token_id", "token_ids"))
    }
