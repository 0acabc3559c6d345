"""A language model that learns the teacher's tokens, with its distributions where there are any."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from journeyman.errors import DataError
from journeyman.recipe import Student, Training
from journeyman.student import (
    acceleration,
    causal,
    flops,
    lora,
    models,
    projection,
    row_weights,
    start,
    token_dataset,
    token_rows,
)
from journeyman.student.divergences import Objective, SparseTeacher, judged, within
from journeyman.student.flops import Work
from journeyman.student.learner import Measured
from journeyman.student.token_dataset import TokenBatch, TokenDataset

_LARGEST_EXPONENT = 700.0  # of a float64
_EVALUATION_BATCH = 16
_SAMPLE_ROWS = 64  # that layers are compared on
# Held-out divergences are of one kind whatever is trained on, so that runs can be compared.
_KL = Objective(divergence="forward_kl", tail="bucket")


class Causal:
    """A ``Learner``: see there."""

    def __init__(
        self,
        folder: Path | None,
        device: torch.device,
        *,
        model_dir: Path,
        student: Student,
        training: Training,
        rows_dir: Path,
    ) -> None:
        """folder: a checkpoint's weights, else those that ``student`` asks for, of model_dir.
        rows_dir: as ``token_rows.build`` wrote it. Raises DataError, ModelError."""
        self._rows, self._held_out = (TokenDataset(rows_dir / s) for s in token_rows.SPLITS)
        gold = rows_dir / token_rows.GOLD
        self._gold = TokenDataset(gold) if gold.exists() else None
        self._tokenizer = models.load_tokenizer(model_dir)
        if (rows_dir / token_rows.TOKENIZER).exists():  # the teacher's, with its chat template
            self._tokenizer = models.load_tokenizer(
                rows_dir / token_rows.TOKENIZER, self._tokenizer.model_max_length
            )
        self._kept: list[int] = []  # numbers of the layers that stay of a model that is pruned
        model = self._model(folder, model_dir, student, training.seed)
        models.check_positions(model.config, student.max_length, model_dir)
        if training.activation_checkpointing:
            models.checkpoint_activations(model)
        self._device, self._precision = device, training.precision
        self.module = _Projected(model, objective(training))
        self._n_outputs = len(causal.backbone_and_head(model)[1])
        self.work = self._work()
        self.measured_in_s = 0.0
        rows, self._examples = self._rows, self._rows.examples
        begins = self._examples[:-1]
        self.row_ids = rows.ids
        self.lengths = np.add.reduceat(rows.lengths, begins)
        self.n_learned = np.add.reduceat(rows.n_learned, begins)
        if rows.reasoning.any():
            self.row_ids = [rows.ids[i] for i in begins]
            self.sizes = np.ones(len(begins), np.int64)
            self._weights = len(begins) * row_weights.of_tasks(
                rows.weights, rows.n_learned, rows.reasoning, training.rationale_weight
            )
        else:
            self.sizes = self.n_learned
            self._weights = row_weights.normalised(rows.weights, rows.n_learned)

    def compile(self) -> None:
        """Without the projection, which is part of the loss: that is our own code."""
        backbone, _, _ = causal.backbone_and_head(self.module.model)
        acceleration.compile_in_place(backbone, self._device)

    def _model(self, folder: Path | None, model_dir: Path, student: Student, seed: int) -> Any:
        if folder and not student.lora:
            return causal.load(folder)
        build = partial(causal.build, model_dir, student, seed)
        model, self._kept = start.begun(build, model_dir, student, folder, self._sample_texts)
        return model

    def _sample_texts(self) -> list[str]:
        some = self._rows.batch(np.arange(min(_SAMPLE_ROWS, len(self._rows)))).rows
        return [self._tokenizer.decode(ids) for ids in np.split(some.ids, some.starts[1:-1])]

    def _work(self) -> Work | None:
        backbone, head, _ = causal.backbone_and_head(self.module.model)
        config = self.module.model.config.get_text_config(decoder=True)
        layers = flops.of_layers(backbone, config)
        return layers and dataclasses.replace(layers, per_learned=flops.of_matrices([head]))

    def groups(self, training: Training) -> list[dict[str, Any]]:
        return causal.parameter_groups(
            self.module.model, training.learning_rate, training.weight_decay
        )

    def batches(self, parts: Iterator[np.ndarray]) -> Iterator[TokenBatch]:
        ends = self._examples
        rows = (np.concatenate([np.arange(*ends[i : i + 2]) for i in part]) for part in parts)
        return token_dataset.prefetch(rows, self._rows)

    def loss(self, parallel: Any, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        with acceleration.autocast(self._device, self._precision):
            weights = self._tensor(self._weights[batch.numbers][batch.token_rows])
            weights = weights.float()
            total, each = parallel(**self._arguments(batch), weights=weights)
        examples = np.searchsorted(self._examples, batch.numbers, side="right")
        number = np.cumsum(np.diff(examples, prepend=examples[0]) != 0)  # in the batch
        of_examples = torch.zeros(number[-1] + 1, dtype=each.dtype, device=each.device)
        at = self._tensor(number[batch.token_rows])
        return total, of_examples.index_add_(0, at, each * weights)

    def _arguments(self, batch: TokenBatch) -> dict[str, Any]:
        input_ids, _, at = batch.padded(self._tokenizer.pad_token_id or 0)
        teacher = None
        if batch.token_ids is not None and batch.logprobs is not None:
            assert batch.log_tail_mass is not None
            teacher = SparseTeacher(
                token_ids=self._tensor(batch.token_ids),
                logprobs=self._tensor(batch.logprobs),
                log_tail_mass=self._tensor(batch.log_tail_mass),
                sampled=self._rows.sampled,
            )
            if not self._rows.other_tokens:
                teacher = within(teacher, self._n_outputs)
        return {
            "input_ids": self._tensor(input_ids),
            "at": self._tensor(at),
            "teacher": teacher,
            "targets": self._tensor(batch.targets),
        }

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def evaluate(self, take: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> Measured:
        """On answers: reasonings are a task beside theirs."""
        self.module.eval()
        answers = np.flatnonzero(~self._held_out.reasoning)
        sums, n_right, began = np.zeros(5), 0, time.monotonic()
        with torch.no_grad():  # in inference mode sharded weights could not learn afterwards
            for batch in take(_by_length(self._held_out, answers)):
                sums += self._measured(batch)
            self.measured_in_s = time.monotonic() - began
            if self._gold:
                for batch in take(_by_length(self._gold, np.arange(len(self._gold)))):
                    n_right += self._n_written(batch)
        self.module.train()
        if not np.isfinite(sums).all():
            raise DataError(
                "training stopped at an evaluation: the student's answers to calibrate rows are no "
                "numbers; lower training.learning_rate, or set training.max_grad_norm."
            )
        n_tokens, agreed, loss, nll, n_exact = sums.tolist()
        against = self._held_out.against
        return Measured(
            agreement=agreed / n_tokens,
            n_rows=len(answers),
            against=against,
            kl=loss / n_tokens if against == "distributions" else None,
            cross_entropy=None if against == "distributions" else loss / n_tokens,
            perplexity=math.exp(min(nll / n_tokens, _LARGEST_EXPONENT)),
            exact_match=n_exact / len(answers),
            gold_accuracy=n_right / len(self._gold) if self._gold else None,
        )

    def _measured(self, batch: TokenBatch) -> np.ndarray:
        """float64[5]: tokens, sums of what ``judged`` says of them (of text, of what it is) and of
        -log P; texts of which every token is the first choice."""
        arguments = self._arguments(batch)
        teacher, targets = arguments["teacher"], arguments["targets"]
        hidden, weight, bias = self.module(**arguments)
        own, first = projection.projected_logprobs_at(hidden, weight, bias, targets[:, None])
        nll = -own[:, 0]
        missed, exact = _missed(batch, first, targets)
        if teacher is None or self._held_out.against == "text":
            same = len(nll) - len(missed)
            return np.array([len(nll), same, *2 * [nll.double().sum().item()], exact])
        ones = torch.ones_like(nll)
        _, each = projection.projected_loss(hidden, weight, bias, teacher, targets, ones, _KL)
        loss, agreed = judged(each, first, teacher)
        sums = (values.double().sum().item() for values in (agreed, loss, nll))
        return np.array([len(nll), *sums, exact])

    def _n_written(self, batch: TokenBatch) -> int:
        """Texts of which every token is the first choice behind those before it: those that it
        writes, greedily."""
        arguments = self._arguments(batch)
        hidden, weight, bias = self.module(**arguments)
        targets = arguments["targets"]
        _, first = projection.projected_logprobs_at(hidden, weight, bias, targets[:, None])
        return _missed(batch, first, targets)[1]

    def write(self, module: Any, folder: Path) -> None:
        if lora.is_adapted(module.model):
            lora.write(module.model, self._kept, folder)
        else:
            self._write_plain(module.model, folder)

    def export(self, folder: Path) -> None:
        self._write_plain(lora.merged(self.module.model), folder)

    def _write_plain(self, model: Any, folder: Path) -> None:
        causal.end_with(model, self._tokenizer.eos_token_id)
        with models.quiet():
            model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)


def _by_length(rows: TokenDataset, numbers: np.ndarray) -> Iterator[TokenBatch]:
    order = numbers[np.argsort(rows.lengths[numbers], kind="stable")]
    parts = np.array_split(order, -(-len(order) // _EVALUATION_BATCH))
    return token_dataset.prefetch(iter(parts), rows)


def _missed(
    batch: TokenBatch, first: torch.Tensor, targets: torch.Tensor
) -> tuple[np.ndarray, int]:
    """Tokens that are not the first choice, by their row; rows that have none of these."""
    missed = batch.token_rows[(first != targets).cpu().numpy()]
    return missed, batch.n_rows - len(np.unique(missed))


class _Projected(torch.nn.Module):
    """The student up to its loss, in one call: gradients of the output projection must pass
    through what data parallelism wraps."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, *, weights: torch.Tensor | None = None, **arguments: Any) -> Any:
        """The weighted sum of the losses and each one's; without weights what they are made of:
        hidden states float[m, h] at the learned positions, output projection and its bias."""
        backbone, projected, bias = causal.backbone_and_head(self.model)
        # Without a mask, which would keep PyTorch from its faster kernels: padding stands behind
        # all that is learned, and ``causal`` refuses models that look there.
        states = backbone(input_ids=arguments["input_ids"], use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1)[arguments["at"]]
        if weights is None:
            return hidden, projected, bias
        return projection.projected_loss(
            hidden,
            projected,
            bias,
            arguments["teacher"],
            arguments["targets"],
            weights,
            self._objective,
        )


def objective(training: Training) -> Objective:
    """The recipe's, of tokens."""
    return Objective(
        divergence=training.divergence,
        tail=training.tail,
        temperature=training.temperature,
        beta=training.beta,
        skew=training.skew,
        cross_entropy=training.cross_entropy,
        label_smoothing=training.label_smoothing,
    )
