"""Some of a model's layers, and all else as it was: which ones stay, and the model of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student import architecture
from journeyman.student.models import load_tokenizer, no_cache, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def of_layers(model: PreTrainedModel, kept: Sequence[int], folder: Path) -> PreTrainedModel:
    """A model of the kept layers, and of all else as it was; it shares the weights' memory. Raises
    ModelError.

    ``transformers`` makes it from the mended config, so that it is what the saved folder will
    be: what depends on a layer's number, such as its place in the cache of keys and values, too.
    """
    import torch

    path, layers = _layers(model, folder)
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config(decoder=True)
    for name, value in architecture.by_layer(vars(text_config), len(layers), kept).items():
        setattr(text_config, name, value)
    text_config.num_hidden_layers = len(kept)
    weights = _renumbered(model.state_dict(), path, kept)
    try:
        with quiet():
            config = type(config).from_dict(config.to_dict())  # as it is read from the folder
            pruned, report = type(model).from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except architecture.unreadable(RuntimeError) as error:
        raise _unknown_layers(model, folder, architecture.first_line(error)) from error
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise _unknown_layers(model, folder, "its layers depend on their place")
    for old, layer in zip(kept, pruned.get_submodule(path), strict=True):
        if changed := _other_settings(layers[old], layer):
            raise _unknown_layers(model, folder, f"{changed} of a layer depends on its place")
    if hasattr(model, "generation_config"):  # of what writes
        pruned.generation_config = model.generation_config
    return pruned


def chosen(
    model: PreTrainedModel, folder: Path, student: Student, sample_texts: Sequence[str] = ()
) -> list[int]:
    """Numbers of as many layers as ``student`` asks for, those that stay; raises ModelError.

    sample_texts: what ``layer_choice: similarity`` measures layers on, a few dozen will do.
    """
    _, layers = _layers(model, folder)
    wanted = student.layers
    assert wanted is not None  # the recipe sees to it
    if wanted > len(layers):
        raise ModelError(f"{folder}: student.layers is {wanted}, and it has {len(layers)} layers.")
    if student.layer_choice == "even":
        return kept_layers(len(layers), wanted)
    if not any(text.strip() for text in sample_texts):
        raise ModelError(
            f"{folder}: student.layer_choice: similarity measures layers on sample texts, and "
            "there are none; give some, or take layer_choice: even."
        )
    influence = block_influence(model, folder, sample_texts, student.max_length)
    return sorted(np.argsort(-influence, kind="stable")[:wanted].tolist())


def kept_layers(there: int, wanted: int) -> list[int]:
    """Numbers of the layers that stay: the first, the last, evenly spaced ones between."""
    if wanted == 1:
        return [0]
    return [int(i) for i in np.rint(np.linspace(0, there - 1, wanted))]


def block_influence(
    model: PreTrainedModel, folder: Path, texts: Sequence[str], max_length: int
) -> np.ndarray:
    """How much each layer changes hidden states, float64[layers]: 1 - the mean cosine of its input
    and its output over all tokens (Men et al. 2024, ShortGPT, formula 1).

    folder: where the tokenizer is; texts are cut at max_length tokens.
    """
    import torch

    tokenizer = load_tokenizer(folder)
    _, layers = _layers(model, folder)
    sums = np.zeros(len(layers))

    def measure(number: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
            sums[number] += cosine.double().sum().item()

        return hook

    # Hooks, since the last of a model's `hidden_states` is behind the final norm.
    hooks = [
        layer.register_forward_hook(measure(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    n_tokens, options = 0, no_cache(model)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for text in texts:
                ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
                if ids:
                    model.base_model(input_ids=torch.tensor([ids]), **options)
                    n_tokens += len(ids)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return 1 - sums / max(n_tokens, 1)


def _other_settings(one: torch.nn.Module, other: torch.nn.Module) -> str:
    """Name of a setting, such as a window, in which two layers differ, their number aside."""
    others = dict(other.named_modules())
    for path, module in one.named_modules():
        if path not in others:
            return path
        there = vars(others[path])
        for name, value in vars(module).items():
            number = any(part in name for part in ("idx", "index", "layer_id", "layer_number"))
            plain = isinstance(value, bool | int | float | str | None)
            if plain and not number and there.get(name) != value and name != "training":
                return name
    return ""


def _renumbered(
    weights: dict[str, torch.Tensor], path: str, kept: Sequence[int]
) -> dict[str, torch.Tensor]:
    new = {old: number for number, old in enumerate(kept)}
    result = {}
    for name, value in weights.items():
        if not name.startswith(f"{path}."):
            result[name] = value
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if int(number) in new:
            result[f"{path}.{new[int(number)]}.{rest}"] = value
    return result


def _layers(model: PreTrainedModel, folder: Path) -> tuple[str, Any]:
    """Name and value of the list of transformer layers."""
    import torch

    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
        if not any(part.isdigit() for part in name.split("."))  # a list inside a layer: experts
    ]
    if len(found) != 1:
        raise _unknown_layers(model, folder, f"no list of {wanted} layers was found")
    return found[0]


def _unknown_layers(model: PreTrainedModel, folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{folder}: start: pruned does not know the architecture {type(model).__name__} ({why})."
    )
