"""An encoder that learns class distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import DataError
from journeyman.labels import confidence
from journeyman.labels.dataset import ClassRows
from journeyman.probabilities import expected_calibration_error
from journeyman.recipe import Student, Training
from journeyman.student import acceleration, batches, flops, losses, models, row_weights
from journeyman.student.batches import TokenRows
from journeyman.student.inputs import Inputs
from journeyman.student.learner import Measured, no_rows

if TYPE_CHECKING:
    import torch

_EVALUATION_BATCH = 64


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
        read_rows: Callable[[], Iterable[ClassRows]],
    ) -> None:
        """folder: a checkpoint's weights, else those of model_dir. read_rows: gives them in parts,
        whose texts are dropped one after the other. Raises DataError, ModelError."""
        self._training, self._device = training, device
        self._tokenizer = models.load_tokenizer(model_dir, student.max_length)
        if student.text_pair is not None:
            # What tells the two apart is the separator. Whoever loads the exported folder must
            # leave out token types too, which its own tokenizer decides.
            self._tokenizer.model_input_names = ["input_ids", "attention_mask"]
            self._tokenizer.init_kwargs["model_input_names"] = self._tokenizer.model_input_names
        inputs = Inputs(student)

        def tokenised(rows: ClassRows) -> TokenRows:
            return batches.tokenise(self._tokenizer, inputs.all(rows.columns), student.max_length)

        self._train, self._held_out = _read(read_rows(), tokenised)
        self._tokens, self._held_out_tokens = self._train.tokens, self._held_out.tokens
        self._labels = self._train.labels
        self.module = models.build(folder or model_dir, self._labels, training.seed)
        models.check_positions(self.module.config, student.max_length, model_dir)
        if self.module.config.pad_token_id != self._pad_id:  # a decoder reads its last token's
            self.module.config.pad_token_id = self._pad_id  # states, and must tell it from padding
        if training.activation_checkpointing:
            models.checkpoint_activations(self.module)
        self.work = flops.of_layers(self.module.base_model, self.module.config)
        self.row_ids = self._train.ids
        self.lengths = self._tokens.lengths
        self.sizes = self.n_learned = np.ones(len(self._train.ids), np.int64)
        self._targets = self._train.logprobs
        if training.hard_labels:
            self._targets = losses.first_choices(self._targets)
        self._class_weights = self._weigh_classes(device)
        self._weights: np.ndarray | None = None
        if training.row_weight != "none":
            sure = confidence.of_classes(self._train.logprobs)
            self._weights = row_weights.normalised(sure, self.sizes)

    def _weigh_classes(self, device: torch.device) -> torch.Tensor | None:
        """float32[c]; raises DataError where a class that has no rows would be balanced."""
        import torch

        wanted, labels = self._training.class_weight, self._labels
        if wanted == "none":
            return None
        if wanted == "balanced":
            found = losses.balanced(np.exp(self._targets))
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
            self.module,
            encoder_rate=training.learning_rate,
            head_rate=training.head_learning_rate,
        )

    def batches(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return parts

    def loss(self, parallel: Any, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        device = self.module.device
        input_ids, mask = models.tensors(self._tokens, batch, self._pad_id, device)
        with acceleration.autocast(device, self._training.precision):
            logits = parallel(input_ids=input_ids, attention_mask=mask).logits
        loss = losses.distillation(
            logits.float(),
            torch.from_numpy(self._targets[batch]).to(device, torch.float32),
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
        """Rows are in memory, where nothing is read."""
        self.module.eval()
        logits = models.logits_of(
            self.module,
            self._held_out_tokens,
            pad_id=self._pad_id,
            batch_size=_EVALUATION_BATCH,
        ).astype(np.float64)
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
        with models.quiet():
            module.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def export(self, folder: Path) -> None:
        self.write(self.module, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The rows of a split as they are learned; arrays as in ``ClassRows``."""

    labels: tuple[str, ...]
    ids: list[str]
    tokens: TokenRows
    gold: np.ndarray
    logprobs: np.ndarray


def _read(
    parts: Iterable[ClassRows], tokenised: Callable[[ClassRows], TokenRows]
) -> tuple[_Rows, _Rows]:
    """Train and calibrate rows; raises DataError where one of the two has none."""
    found: dict[str, list[_Rows]] = {"train": [], "calibrate": []}
    for part in parts:
        for split, read in found.items():
            rows = part.split(split)
            if len(rows):
                read.append(
                    _Rows(
                        labels=rows.labels, ids=rows.ids, tokens=tokenised(rows), gold=rows.gold,
                        logprobs=rows.logprobs,
                    )
                )  # fmt: skip
    train, calibrate = (_joined(read, split) for split, read in found.items())
    return train, calibrate


def _joined(parts: list[_Rows], split: str) -> _Rows:
    if not parts:
        raise no_rows(split)
    return _Rows(
        labels=parts[0].labels,
        ids=[row_id for part in parts for row_id in part.ids],
        tokens=batches.joined([part.tokens for part in parts]),
        gold=np.concatenate([part.gold for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
    )
