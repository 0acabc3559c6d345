"""Language models as students: where they start, and where their output projection is.

Always a standard class of ``transformers``, so that an exported folder needs nothing of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student.models import load_tokenizer, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# Config values that change logits behind the projection, which the losses would not see.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def build(folder: Path, student: Student, seed: int) -> PreTrainedModel:
    """The student before its first step, float32; seed: of random weights. Raises ModelError."""
    if student.start == "fresh":
        return _fresh(folder, student, seed)
    model = load(folder)
    if student.start == "pruned":
        assert student.layers is not None  # the recipe sees to it
        _prune(model, student.layers, folder)
    return model


def load(folder: Path) -> PreTrainedModel:
    """The folder's language model as it is, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise _no_language_model(folder, error) from error
    return _checked(model, folder)


def _fresh(folder: Path, student: Student, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = student.config | ({"num_hidden_layers": student.layers} if student.layers else {})
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **changes)
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_language_model(folder, error) from error
    return _checked(model, folder)


def _no_language_model(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{folder}: transformers cannot make a language model of it "
        f"({str(error).splitlines()[0]}); student.model must name a causal one."
    )


def _checked(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    scaled = [n for n in _SCALES if getattr(model.config, n, None) not in (None, 1, 1.0)]
    if scaled:
        raise ModelError(
            f"{folder}: its config scales or caps logits ({', '.join(scaled)}), which training "
            "does not follow yet; take a student without."
        )
    return model


def kept_layers(there: int, wanted: int) -> list[int]:
    """Numbers of the layers that stay: the first, the last, evenly spaced ones between."""
    if wanted == 1:
        return [0]
    return [int(i) for i in np.rint(np.linspace(0, there - 1, wanted))]


def _prune(model: PreTrainedModel, wanted: int, folder: Path) -> None:
    """Take layers out in place; embeddings, final norm and output projection stay."""
    import torch

    config = model.config
    path, layers = _layers(model, folder)
    if wanted > len(layers):
        raise ModelError(f"{folder}: student.layers is {wanted}, and it has {len(layers)} layers.")
    kept = kept_layers(len(layers), wanted)
    parent = model.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], torch.nn.ModuleList([layers[i] for i in kept]))
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(layers):  # layer_types, say
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    for number, layer in enumerate(parent.get_submodule(path.rpartition(".")[2])):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of keys and values
                module.layer_idx = number


def _layers(model: PreTrainedModel, folder: Path) -> tuple[str, Any]:
    """Name and value of the list of transformer layers."""
    import torch

    wanted = _n_layers(model.config)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
    ]
    if len(found) != 1:
        raise ModelError(
            f"{folder}: no list of {wanted} layers was found in {type(model).__name__}; start: "
            "pruned does not know this architecture."
        )
    return found[0]


def _n_layers(config: PretrainedConfig) -> int:
    return config.num_hidden_layers


def backbone_and_head(model: PreTrainedModel) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """What gives hidden states, after the final norm; and the output projection, float[v, h]."""
    head = model.get_output_embeddings()
    return model.base_model, head.weight, getattr(head, "bias", None)


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices, and without decay the vectors (norms, biases)."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]


def other_vocabulary(student: Path, teacher: Path) -> str:
    """How the student's tokens differ from the teacher's; empty if each token is the same one."""
    theirs = load_tokenizer(teacher).get_vocab()
    ours = load_tokenizer(student).get_vocab()
    for token, number in sorted(theirs.items(), key=lambda item: item[1]):
        if ours.get(token) != number:
            known = f"{ours[token]}" if token in ours else "no token"
            return f"{token!r} is {number} to the teacher and {known} to the student"
    return ""
