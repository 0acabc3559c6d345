"""Language models as students: where they start, and where their output projection is.

Always a standard class of ``transformers`` (inside a ``peft`` model while LoRA trains), so that an
exported folder needs nothing of ours.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Sequence
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


def build(
    folder: Path, student: Student, seed: int, sample_texts: Sequence[str] = ()
) -> PreTrainedModel:
    """The student before its first step, float32; with ``lora`` a ``peft`` model around it.

    seed: of random weights; sample_texts: what ``layer_choice: similarity`` measures layers on, a
    few dozen will do. Raises ModelError.
    """
    import torch

    if student.start == "fresh":
        return _fresh(folder, student, seed)
    model = load(folder)
    if student.start == "pruned":
        model = _pruned(model, _kept(model, folder, student, sample_texts), folder)
    if student.lora:
        torch.manual_seed(seed)
        model = _with_lora(model, student, folder)
    return model


def load(folder: Path) -> PreTrainedModel:
    """The folder's language model as it is, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(folder)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True
            )
    except _unreadable() as error:
        raise _no_language_model(folder, error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{folder}: it lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}; student.model must name a causal language model."
        )
    return _checked(model, folder)


def _config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder)
    except _unreadable() as error:
        raise _no_language_model(folder, error) from error
    if config.is_encoder_decoder:
        raise ModelError(
            f"{folder}: {config.model_type} is an encoder-decoder model; student.model must name "
            "a causal one, which is a decoder only."
        )
    return config


def _unreadable(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What ``transformers`` raises for folders and configs that it cannot make a model of."""
    from huggingface_hub.errors import StrictDataclassError

    return (OSError, ValueError, KeyError, TypeError, StrictDataclassError, *more)


def _no_language_model(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{folder}: transformers cannot make a language model of it ({_first_line(error)}); "
        "student.model must name a causal one."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _checked(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Refuse models whose logits are more than hidden states times projection."""
    import torch

    config = model.config.get_text_config(decoder=True)
    scaled = [n for n in _SCALES if getattr(config, n, None) not in (None, 1, 1.0)]
    if scaled:
        raise ModelError(
            f"{folder}: its config scales or caps logits ({', '.join(scaled)}), which training "
            "does not follow yet; take a student without."
        )
    backbone, weight, bias = backbone_and_head(model)
    tokens = torch.arange(4).unsqueeze(0) % len(weight)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state
        theirs = model(input_ids=tokens, use_cache=False).logits
    model.train(was_training)
    same = hidden.shape[-1] == weight.shape[-1] and torch.allclose(
        torch.nn.functional.linear(hidden, weight, bias), theirs, rtol=1e-3, atol=1e-3
    )
    if not same:
        raise ModelError(
            f"{folder}: the logits of {type(model).__name__} are not its last hidden states times "
            "its output projection, which training relies on; take another architecture."
        )
    return model


def _fresh(folder: Path, student: Student, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    config = _changed(_config(folder), student, folder)
    try:
        with quiet():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except _unreadable(RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"{folder}: transformers cannot make a language model with student.config "
            f"{student.config} ({_first_line(error)})."
        ) from error
    return _checked(model, folder)


def _changed(base: PretrainedConfig, student: Student, folder: Path) -> PretrainedConfig:
    """The folder's config with the student's values in it."""
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
        changes = {number: student.layers} | _by_layer(values, values[number], pattern) | changes
    try:
        return type(base).from_dict(values | changes)
    except _unreadable() as error:
        raise ModelError(
            f"{folder}: student.config does not fit ({_first_line(error)})."
        ) from error


def _by_layer(values: dict[str, Any], n_layers: int, chosen: Sequence[int]) -> dict[str, Any]:
    """The config's lists that have a value for each layer, for the layers chosen."""
    return {
        name: [value[i] for i in chosen]
        for name, value in values.items()
        if isinstance(value, list) and len(value) == n_layers
        if name != "architectures" and not name.endswith(("token_id", "token_ids"))
    }


def _check_vocab_size(wanted: int, folder: Path) -> None:
    known = len(load_tokenizer(folder))
    if wanted < known:
        raise ModelError(
            f"{folder}: student.config.vocab_size is {wanted}, and its tokenizer knows {known} "
            "tokens; give at least as many."
        )


def _kept(
    model: PreTrainedModel, folder: Path, student: Student, sample_texts: Sequence[str]
) -> list[int]:
    """Numbers of the layers that stay."""
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
    n_tokens = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for text in texts:
                ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
                if ids:
                    model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
                    n_tokens += len(ids)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return 1 - sums / max(n_tokens, 1)


def _pruned(model: PreTrainedModel, kept: Sequence[int], folder: Path) -> PreTrainedModel:
    """A model of the kept layers, and of all else as it was; it shares the weights' memory.

    ``transformers`` makes it from the mended config, so that it is what the saved folder will
    be: what depends on a layer's number, such as its place in the cache of keys and values, too.
    """
    import torch

    path, layers = _layers(model, folder)
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config(decoder=True)
    for name, value in _by_layer(vars(text_config), len(layers), kept).items():
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
    except _unreadable(RuntimeError) as error:
        raise _unknown_layers(model, folder, _first_line(error)) from error
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise _unknown_layers(model, folder, "its layers depend on their place")
    for old, layer in zip(kept, pruned.get_submodule(path), strict=True):
        if changed := _other_settings(layers[old], layer):
            raise _unknown_layers(model, folder, f"{changed} of a layer depends on its place")
    pruned.generation_config = model.generation_config
    return pruned


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


def _with_lora(model: PreTrainedModel, student: Student, folder: Path) -> Any:
    lora = student.lora
    assert lora is not None
    try:
        # By name: an optional package, which type checkers may not find.
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(
            f"student.lora needs the package peft ({_first_line(error)}); "
            "pip install 'journeyman[lora]'."
        ) from error
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
            f"{folder}: peft cannot adapt it with student.lora ({_first_line(error)}); check "
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
    """The plain model, low-rank matrices added to its weights; ``model`` itself can train on.

    With LoRA it is a copy; any other model is given back as it is.
    """
    if not _is_adapted(model):
        return model
    return copy.deepcopy(model).merge_and_unload()


def adapter(model: Any) -> dict[str, Any] | None:
    """The low-rank matrices by name, for ``restore``; None without LoRA."""
    if not _is_adapted(model):
        return None
    return importlib.import_module("peft").get_peft_model_state_dict(model)


def restore(model: Any, matrices: dict[str, Any]) -> None:
    """Put the low-rank matrices of a checkpoint in the place of those that ``build`` made."""
    importlib.import_module("peft").set_peft_model_state_dict(model, matrices)


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def backbone_and_head(model: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """What gives hidden states, after the final norm, and the output projection.

    The backbone is called as the model is; its ``last_hidden_state`` is float[b, t, h]. The
    projection is float[v, h], its bias float[v]; logits are hidden · projectionᵀ + bias.
    """
    plain = model.get_base_model() if _is_adapted(model) else model
    head = plain.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ModelError(
            f"{type(plain).__name__} has no output projection that training could use; take "
            "another architecture."
        )
    return plain.base_model, head.weight, getattr(head, "bias", None)


def parameter_groups(model: Any, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices, and without decay the vectors (norms, biases).

    Embeddings are matrices and decay: tied, they are the output projection at the same time.
    Parameters that do not learn, as under LoRA, are in neither group.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]


def other_vocabulary(student: Path, teacher: Path) -> str:
    """Why the student cannot learn the teacher's tokens; empty if each token is the same one.

    Both are folders with a tokenizer; all of the teacher's tokens count, added ones too.
    """
    theirs = sorted(load_tokenizer(teacher).get_vocab().items(), key=lambda item: item[1])
    ours = load_tokenizer(student).get_vocab()
    for token, number in theirs:
        if ours.get(token) != number:
            known = f"{ours[token]}" if token in ours else "no token"
            return f"{token!r} is {number} to the teacher and {known} to the student"
    if not (student / "config.json").is_file():
        return ""
    n_outputs = _config(student).get_text_config(decoder=True).vocab_size
    token, number = theirs[-1]
    if number >= n_outputs:
        return f"{token!r} is {number}, and the student's model ends at {n_outputs - 1}"
    return ""
