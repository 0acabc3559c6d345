"""Language models as students: where they start, and where their output projection is.

Always a standard class of ``transformers`` (inside a ``peft`` model while LoRA trains), so that an
exported folder needs nothing of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student import architecture, lora, start
from journeyman.student.models import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Config values that change logits behind the projection, which the losses would not see.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def build(
    folder: Path,
    student: Student,
    seed: int,
    keep: start.Keep | None = None,
) -> Any:
    """The student before its first step, float32; with ``lora`` a ``peft`` model around it.

    seed: of random weights; keep: as of ``start.shaped``. Raises ModelError.
    """
    if student.start == "fresh":
        return _fresh(folder, student, seed)
    return start.shaped(load(folder), folder, student, seed, keep)


def load(folder: Path) -> PreTrainedModel:
    """The folder's language model as it is, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    config = architecture.read_config(folder)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True
            )
    except architecture.unreadable() as error:
        raise architecture.no_language_model(folder, error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{folder}: it lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}; student.model must name a causal language model."
        )
    return _checked(model, folder)


def _checked(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Refuse models whose logits are more than hidden states times projection, and those that see
    what stands behind a token."""
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
        begun = backbone(input_ids=tokens[:, :2], use_cache=False).last_hidden_state
    model.train(was_training)
    same = hidden.shape[-1] == weight.shape[-1] and torch.allclose(
        torch.nn.functional.linear(hidden, weight, bias), theirs, rtol=1e-3, atol=1e-3
    )
    if not same:
        raise ModelError(
            f"{folder}: the logits of {type(model).__name__} are not its last hidden states times "
            "its output projection, which training relies on; take another architecture."
        )
    if not torch.allclose(begun, hidden[:, :2], rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{folder}: a {type(model).__name__} of this config sees the tokens that it is to "
            "predict; student.model must name a causal language model."
        )
    return model


def _fresh(folder: Path, student: Student, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    config = architecture.changed(architecture.read_config(folder), student, folder)
    try:
        with quiet():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except architecture.unreadable(RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"{folder}: transformers cannot make a language model with student.config "
            f"{student.config} ({architecture.first_line(error)})."
        ) from error
    return _checked(model, folder)


def backbone_and_head(model: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """What gives hidden states, after the final norm, and the output projection.

    The backbone is called as the model is; its ``last_hidden_state`` is float[b, t, h]. The
    projection is float[v, h], its bias float[v]; logits are hidden · projectionᵀ + bias.
    """
    plain = lora.plain(model)
    head = plain.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ModelError(
            f"{type(plain).__name__} has no output projection that training could use; take "
            "another architecture."
        )
    return plain.base_model, head.weight, getattr(head, "bias", None)


def end_with(model: Any, token: int | None) -> None:
    """Have ``generate`` end texts with this token, too, as those that were learned do."""
    settings = model.generation_config
    known = settings.eos_token_id
    ends = [known] if isinstance(known, int) else known or []
    if token is not None and token not in ends:
        settings.eos_token_id = [token, *ends]


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
