"""The classifier: built from a pretrained encoder, and asked for logits.

Always a standard class of ``transformers``, so that an exported folder needs nothing of ours.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import ModelError
from journeyman.student.batches import TokenRows, passes, tokenise
from journeyman.student.inputs import Input

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_COUNT_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
)


def build(
    folder: Path, labels: Sequence[str], seed: int, pad_id: int | None = None
) -> PreTrainedModel:
    """A classifier over ``labels``, float32, with the folder's weights where they fit.

    seed: of the weights that the folder does not have, as a rule the classification head; pad_id:
    the token behind a text's end, by default the folder's own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    try:
        with quiet():
            return AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=classifying(AutoConfig.from_pretrained(folder), labels, pad_id),
                ignore_mismatched_sizes=True,  # a head for another number of labels
                dtype=torch.float32,
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}: transformers cannot make a text classifier of it ({error}); "
            "student.model must name an encoder, or a language model."
        ) from error


def classifying(config: Any, labels: Sequence[str], pad_id: int | None) -> Any:
    """The config with the labels in it, and pad_id where a model of several has its language."""
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    if pad_id is not None:  # a decoder reads its last token's states, and must tell it from padding
        config.get_text_config().pad_token_id = pad_id
    return config


def has_parts_beside_text(module: torch.nn.Module) -> bool:
    """Whether there are weights that no text reaches, those of a vision tower, say."""
    configs = [getattr(part, "config", None) for part in module.modules()]
    return any(
        config is not None and config.get_text_config() is not config
        for config in configs
        if hasattr(config, "get_text_config")
    )


def check_pairs(tokenizer: Any, folder: Path) -> None:
    """Raises ModelError where it puts nothing between two texts."""
    of_one, of_two = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
    if of_two <= of_one:
        raise ModelError(
            f"student.text_pair: the tokenizer of {folder} puts nothing between two texts; write "
            "both into student.text, with words between them."
        )


def check_positions(config: Any, max_length: int, folder: Path) -> None:
    """Raises ModelError where inputs of max_length tokens have no place in the model."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kind begin to count behind the padding token's id.
    first = (config.pad_token_id or 0) + 1 if config.model_type in _COUNT_FROM_PADDING else 0
    if positions is not None and max_length > positions - first:
        raise ModelError(
            f"student.max_length: {folder} reads {positions - first} tokens at most, and "
            f"{max_length} are asked for; lower it, or take another student."
        )


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input only, and compute the rest again in backward; raises ModelError."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"training.activation_checkpointing: transformers has none for this student ({error}); "
            "leave it out, or take another student.model."
        ) from error


def load_tokenizer(folder: Path, max_length: int | None = None) -> Any:
    """The folder's tokenizer; max_length: its new longest input, in tokens, saved with it."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be read ({error}).") from error
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer


def copy_on_cpu(model: Any) -> Any:
    """The model with a copy of its weights in the host's memory; shared weights stay shared, and
    those that do not learn are the model's own."""
    return copied(model, lambda w: w.to("cpu", copy=True) if w.requires_grad else w)


def copied(model: Any, take: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The model with other weights, made by ``take`` of its own; shared ones stay shared."""
    import torch

    copies: dict[int, Any] = {id(b): b.to("cpu", copy=True) for b in model.buffers()}
    for weight in model.parameters():
        taken = take(weight).detach()
        copies[id(weight)] = torch.nn.Parameter(taken, requires_grad=weight.requires_grad)
    return copy.deepcopy(model, copies)


def parameter_groups(
    model: PreTrainedModel, *, encoder_rate: float, head_rate: float
) -> list[dict[str, Any]]:
    """AdamW's two groups: the pretrained encoder, and the head on top of it.

    The pooler counts as head: sentence encoders are trained without theirs. Parameters that do not
    learn, as under LoRA, are in neither group.
    """
    encoder = [p for name, p in model.base_model.named_parameters() if "pooler." not in name]
    in_encoder = {id(p) for p in encoder}
    head = [p for p in model.parameters() if id(p) not in in_encoder and p.requires_grad]
    encoder = [p for p in encoder if p.requires_grad]
    return [{"params": encoder, "lr": encoder_rate}, {"params": head, "lr": head_rate}]


def no_cache(model: Any) -> dict[str, bool]:
    """What to call a model with that is asked for a whole text at once: of a decoder no keys and
    values are kept."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def logits_of(
    model: PreTrainedModel,
    rows: TokenRows,
    *,
    pad_id: int,
    batch_size: int,
    batch_tokens: int | None = None,
) -> np.ndarray:
    """float32[n, c], in the order of the rows; batched by length, without gradients. batch_tokens:
    of a batch at most, as ``passes`` counts them."""
    import torch

    n_labels = model.config.num_labels
    result = np.empty((len(rows), n_labels), np.float32)
    options = no_cache(model)
    with torch.no_grad():  # in inference mode sharded weights could not learn afterwards
        for batch in passes(rows.lengths, batch_size, batch_tokens):
            input_ids, mask = tensors(rows, batch, pad_id, model.device)
            logits = model(input_ids=input_ids, attention_mask=mask, **options).logits
            result[batch] = logits.float().cpu()
    return result


def tensors(
    rows: TokenRows, batch: np.ndarray, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask: int64[b, t] each."""
    import torch

    input_ids, mask = rows.padded(batch, pad_id)
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(mask).to(device)


class Classifier:
    """An exported student, ready to answer. One thread at a time may call it."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model = model.eval()
        self._tokenizer = tokenizer
        names = model.config.id2label
        self.labels: tuple[str, ...] = tuple(names[i] for i in range(len(names)))

    @classmethod
    def load(cls, path: Path, threads: int | None = None) -> Classifier:
        """threads: of the whole process's torch, default as they are."""
        import torch
        from transformers import AutoModelForSequenceClassification

        if not (Path(path) / "config.json").is_file():
            raise ModelError(f"{path}: no student here (config.json is missing); train one first.")
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with quiet():
                model = AutoModelForSequenceClassification.from_pretrained(
                    path, dtype=torch.float32
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path}: the student cannot be loaded ({error}).") from error
        return cls(model, load_tokenizer(path))

    def logits(
        self, texts: Sequence[Input], batch_size: int = 32, batch_tokens: int | None = None
    ) -> np.ndarray:
        """float32[n, c], columns as in ``labels``; texts: as the recipe's ``Inputs`` makes them;
        batch_size, batch_tokens: of one forward pass, see ``passes``."""
        import torch

        rows = tokenise(self._tokenizer, texts, self._tokenizer.model_max_length)
        pad_id = self._tokenizer.pad_token_id or 0  # as ``Classifying`` pads
        with torch.inference_mode():
            return logits_of(
                self.model, rows, pad_id=pad_id, batch_size=batch_size, batch_tokens=batch_tokens
            )

    def pack(self) -> None:
        """Answer faster on the CPU from now on; neither trains nor moves any more."""
        from journeyman.student import packed

        packed.pack(self.model)

    def unload(self) -> None:
        """Give back the memory of its weights; it answers nothing more."""
        import torch

        from journeyman.student import packed

        device = self.model.device
        packed.release(self.model)
        self.model.to("meta")
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Spare the terminal the loading bars and the note that a head is new, which it must be."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
