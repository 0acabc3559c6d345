"""What a LoRA adapter's folder must hold for a teacher to be served with it.

vLLM 0.29 loads some adapters otherwise than they were trained, without a word: it scales all
matrices by one lora_alpha / r, and copies a matrix of another width into a corner of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from journeyman.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of each weight that peft saves, before its name in the model
_UNKNOWN = {  # to vLLM
    "use_dora": "DoRA",
    "modules_to_save": "weights saved whole (modules_to_save)",
    "rank_pattern": "ranks by module (rank_pattern)",
    "alpha_pattern": "scales by module (alpha_pattern)",
    "lora_bias": "biases",
}


def rank(adapter: Path) -> int:
    return int(_config(adapter)["r"])


def check(adapter: Path, model: Path, reference: str) -> None:
    """Raise ModelError unless ``adapter`` is a LoRA adapter for the model in that folder, and one
    that vLLM knows to add."""
    if not (adapter / CONFIG).is_file() or not (adapter / WEIGHTS).is_file():
        raise ModelError(
            f"{reference}: {adapter} is no LoRA adapter ({CONFIG} and {WEIGHTS}); "
            "check teacher.lora."
        )
    try:
        config = _config(adapter)
        shapes = _shapes(adapter / WEIGHTS)
    except (ValueError, OSError) as error:
        raise ModelError(f"{reference}: {adapter} cannot be read ({error}).") from error
    if config.get("peft_type", "LORA") != "LORA" or not isinstance(config.get("r"), int):
        raise ModelError(
            f"{reference}: an adapter of type {config.get('peft_type')}; teacher.lora is for LoRA."
        )
    unknown = [words for key, words in _UNKNOWN.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        unknown.append(_UNKNOWN["lora_bias"])
    if unknown:
        raise ModelError(
            f"{reference}: vLLM cannot add an adapter with {' and '.join(unknown)}; merge it into "
            "its model (peft's merge_and_unload) and name the merged folder as teacher.model."
        )
    _check_shapes(shapes, model, reference)


def _check_shapes(shapes: dict[str, list[int]], model: Path, reference: str) -> None:
    """What vLLM names otherwise than the model's files do is left to vLLM."""
    own: dict[str, list[int]] = {}
    for file in model.glob("*.safetensors"):
        own |= _shapes(file)
    for name, shape in shapes.items():
        for end, axis in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            weight = name.removeprefix(_PREFIX).removesuffix(end) + ".weight"
            if not name.endswith(end) or weight not in own:
                continue
            if shape[axis] != own[weight][axis]:
                raise ModelError(
                    f"{reference}: made for another model: {name} is for a width of "
                    f"{shape[axis]}, and teacher.model has {own[weight][axis]} there."
                )


def _config(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text())
    return config


def _shapes(file: Path) -> dict[str, list[int]]:
    """Of the tensors in a safetensors file; raises OSError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from error
