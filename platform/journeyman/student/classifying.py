"""A classifier that learns class distributions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import DataError
from journeyman.probabilities import expected_calibration_error
from journeyman.recipe import Student, Training
from journeyman.student import (
    acceleration,
    classifier,
    flops,
    lora,
    losses,
    models,
    row_weights,
    start,
)
from journeyman.student.class_rows import HeldOutRows, TrainRows
from journeyman.student.learner import Measured

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_EVALUATION_BATCH = 64
_SAMPLE_ROWS = 64  # that layers are compared on


def load_tokenizer(model_dir: Path, student: Student) -> PreTrainedTokenizerBase:
    """The one that a classifier's inputs are read with; raises ModelError."""
    tokenizer = models.load_tokenizer(model_dir, student.max_length)
    if tokenizer.pad_token is None:  # of a language model, as a rule
        tokenizer.pad_token = tokenizer.eos_token
    if student.text_pair is not None:
        models.check_pairs(tokenizer, model_dir)
        # What tells the two apart is the separator. Whoever loads the exported folder must
        # leave out token types too, which its own tokenizer decides.
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    # Those who read the exported tokenizer.json alone cut as the student was trained, and do not
    # pad as its parent's may say.
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.enable_truncation(student.max_length, direction=tokenizer.truncation_side)
        backend.no_padding()
    return tokenizer


class Classifying:
    """A ``Learner``: see there."""

    def __init__(
        self,
        folder: Path | None,
        device: torch.device,
        *,
        model_dir: Path,
        student: Student,
        training: Training,
        read_rows: Callable[[], tuple[TrainRows, HeldOutRows]],
    ) -> None:
        """folder: a checkpoint's weights, else those that ``student`` asks for, of model_dir.
        Raises DataError, ModelError."""
        self._training, self._device = training, device
        self._tokenizer = load_tokenizer(model_dir, student)
        self._train, self._held_out = read_rows()
        self._tokens, self._held_out_tokens = self._train.tokens, self._held_out.tokens
        self._labels = self._train.labels
        self._kept: list[int] = []  # numbers of the layers that stay of a model that is pruned
        self.module = self._model(folder, model_dir, student)
        models.check_positions(self.module.config, student.max_length, model_dir)
        if training.activation_checkpointing:
            models.checkpoint_activations(self.module)
        self.work = flops.of_layers(lora.plain(self.module).base_model, self.module.config)
        self.row_ids = self._train.ids
        self.lengths = self._tokens.lengths
        self.sizes = self.n_learned = np.ones(len(self._train.ids), np.int64)
        self._class_weights = self._weigh_classes(device)
        self.measured_in_s = 0.0
        self._weights: np.ndarray | None = None
        if training.row_weight != "none":
            self._weights = row_weights.normalised(self._train.sure, self.sizes)

    def _model(self, folder: Path | None, model_dir: Path, student: Student) -> Any:
        labels, seed = self._labels, self._training.seed
        if folder and not student.lora:
            return models.build(folder, labels, seed, self._pad_id)
        build = partial(classifier.build, model_dir, student, labels, self._pad_id, seed)
        model, self._kept = start.begun(build, model_dir, student, folder, self._sample_texts)
        return model

    def _sample_texts(self) -> list[str]:
        rows, n = self._tokens, min(_SAMPLE_ROWS, len(self._tokens))
        some = np.split(rows.ids[: rows.starts[n]], rows.starts[1:n])
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in some]

    def _weigh_classes(self, device: torch.device) -> torch.Tensor | None:
        """float32[c]; raises DataError where a class that has no rows would be balanced."""
        import torch

        wanted, labels = self._training.class_weight, self._labels
        if wanted == "none":
            return None
        if wanted == "balanced":
            found = losses.balanced(self._train.class_counts)
            if not np.isfinite(found).all():
                absent = labels[int(np.argmax(~np.isfinite(found)))]
                raise DataError(
                    f"the teacher gives {absent} to no train row, so that training.class_weight: "
                    "balanced has no weight for it; name the weights instead."
                )
        else:
            found = np.array([wanted.get(label, 1.0) for label in labels])
        return torch.tensor(found, dtype=torch.float32, device=device)

    def compile(self) -> None:
        acceleration.compile_in_place(self.module, self._device)

    @property
    def _pad_id(self) -> int:
        return self._tokenizer.pad_token_id or 0

    def groups(self, training: Training) -> list[dict[str, Any]]:
        return models.parameter_groups(
            lora.plain(self.module),
            encoder_rate=training.learning_rate,
            head_rate=training.head_learning_rate,
        )

    def batches(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return parts

    def loss(self, parallel: Any, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        device = self.module.device
        input_ids, mask = models.tensors(self._tokens, batch, self._pad_id, device)
        options = models.no_cache(self.module)
        with acceleration.autocast(device, self._training.precision):
            logits = parallel(input_ids=input_ids, attention_mask=mask, **options).logits
        loss = losses.distillation(
            logits.float(),
            torch.from_numpy(self._train.targets(batch)).to(device),
            torch.from_numpy(self._train.gold[batch]).to(device),
            temperature=self._training.temperature,
            gold_weight=self._training.gold_weight,
            class_weights=self._class_weights,
            label_smoothing=self._training.label_smoothing,
        )
        if self._weights is not None:
            loss = loss * torch.from_numpy(self._weights[batch]).to(loss)
        return loss.sum(), loss.detach()

    def evaluate(self, take: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> Measured:
        """Rows are mapped whole: there is no reading that ``take`` could leave to a thread."""
        self.module.eval()
        began = time.monotonic()
        logits = models.logits_of(
            self.module,
            self._held_out_tokens,
            pad_id=self._pad_id,
            batch_size=_EVALUATION_BATCH,
        ).astype(np.float64)
        self.measured_in_s = time.monotonic() - began
        self.module.train()
        if not np.isfinite(logits).all():
            raise DataError(
                "training stopped at an evaluation: the student's answers to calibrate rows are no "
                "numbers; lower training.learning_rate and training.head_learning_rate."
            )
        student = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        teacher, gold = self._held_out.logprobs, self._held_out.gold
        # A class that the teacher rules out (-inf) adds 0.
        gap = np.where(np.isneginf(teacher), 0.0, teacher - student)
        answer, has_gold = student.argmax(axis=1), gold >= 0
        error, sure = expected_calibration_error, np.exp(student)
        return Measured(
            agreement=float((answer == teacher.argmax(axis=1)).mean()),
            kl=float((np.exp(teacher) * gap).sum(axis=1).mean()),
            gold_accuracy=float((answer == gold)[has_gold].mean()) if has_gold.any() else None,
            calibration_error=error(sure, teacher.argmax(axis=1)),
            gold_calibration_error=error(sure[has_gold], gold[has_gold])
            if has_gold.any()
            else None,
            n_rows=len(gold),
        )

    def write(self, module: Any, folder: Path) -> None:
        if lora.is_adapted(module):
            lora.write(module, self._kept, folder)
        else:
            self._write_plain(module, folder)

    def export(self, folder: Path) -> None:
        self._write_plain(lora.merged(self.module), folder)

    def _write_plain(self, model: Any, folder: Path) -> None:
        with models.quiet():
            model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
