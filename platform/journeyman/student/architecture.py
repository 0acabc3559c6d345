"""What ``transformers`` knows of a folder before its weights are read: its config, and what a
recipe makes of it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student.models import load_tokenizer, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(folder: Path) -> PretrainedConfig:
    """A causal language model's; raises ModelError."""
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


def changed(base: PretrainedConfig, student: Student, folder: Path) -> PretrainedConfig:
    """The folder's config with the student's values in it; raises ModelError."""
    values = base.to_dict()
    there = values | dict.fromkeys(base.attribute_map)
    for name in student.config:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {folder / 'config.json'}."
            raise ModelError(f"student.config.{name}: {base.model_type} has no such value; {hint}")
    if "vocab_size" in student.config:
        _check_vocab_size(student.config["vocab_size"], folder)
    changes = {base.attribute_map.get(n, n): value for n, value in student.config.items()}
    if student.layers is not None:
        number = base.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        if number not in values:
            raise ModelError(
                f"{folder}: {base.model_type} is made of several models; start: fresh with layers "
                "takes a language model alone."
            )
        # Values for each layer, such as layer_types, are patterns that repeat.
        pattern = [i % values[number] for i in range(student.layers)]
        changes = {number: student.layers} | by_layer(values, values[number], pattern) | changes
    try:
        return type(base).from_dict(values | changes)
    except unreadable() as error:
        raise ModelError(f"{folder}: student.config does not fit ({first_line(error)}).") from error


def _check_vocab_size(wanted: int, folder: Path) -> None:
    known = len(load_tokenizer(folder))
    if wanted < known:
        raise ModelError(
            f"{folder}: student.config.vocab_size is {wanted}, and its tokenizer knows {known} "
            "tokens; give at least as many."
        )
