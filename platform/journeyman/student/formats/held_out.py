"""Two copies of a student on the same held-out rows: how far apart they are, how good, how fast.

A copy is a function from padded tokens to logits; what runs it, PyTorch or another engine, is not
known here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.student import models
from journeyman.student.batches import TokenRows, tokenise
from journeyman.student.divergences import Objective, SparseTeacher, judged, sparse_loss, within
from journeyman.student.inputs import Inputs
from journeyman.student.learner import Measured
from journeyman.student.token_dataset import TokenBatch, TokenDataset

MOST_ROWS = 512  # evenly spaced ones of a larger split: enough to see a cost of 1%
_CLASSES_BATCH, _TOKENS_BATCH = 32, 8
_LOGITS_BYTES = 64 << 20  # of a batch of texts, which copies answer at every position
_KL = Objective(divergence="forward_kl", tail="bucket")

Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""input_ids and attention_mask, int64[b, t] each, to logits float32[b, c] or float32[b, t, v]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A student and a copy of it on the same rows; speeds are of the two in turns."""

    n_rows: int
    largest_difference: float  # of a log-probability, nats
    student: Measured
    copy: Measured
    student_rows_per_s: float
    copy_rows_per_s: float


class HeldOut(Protocol):
    """Rows that no weight was fitted on, with what the teacher says of them."""

    def __len__(self) -> int: ...

    def batches(self) -> Iterator[Any]: ...

    def inputs(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and attention_mask, int64[b, t] each."""

    def logprobs(self, batch: Any, logits: np.ndarray) -> torch.Tensor:
        """float32[m, c or v]: those that are measured, one row for each answer or token."""

    def sums(self, batch: Any, logprobs: torch.Tensor) -> np.ndarray:
        """What ``measured`` takes, to be added up over batches."""

    def measured(self, sums: np.ndarray) -> Measured: ...


def compare(rows: HeldOut, student: Answer, copy: Answer) -> Compared:
    """Run both over the rows, batch by batch in turns.

    Raises DataError where the copy's answers are no numbers.
    """
    answers, seconds = (student, copy), [0.0, 0.0]
    totals: list[Any] = [0.0, 0.0]
    largest = 0.0
    for number, batch in enumerate(rows.batches()):
        inputs = rows.inputs(batch)
        if number == 0:  # first calls allocate, and choose kernels
            for answer in answers:
                answer(*inputs)
        found: list[Any] = [None, None]
        for side in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            logits = answers[side](*inputs)
            seconds[side] += time.perf_counter() - began
            found[side] = rows.logprobs(batch, logits)
            totals[side] = totals[side] + rows.sums(batch, found[side])
        difference = (found[0] - found[1]).abs().max().item()
        if not math.isfinite(difference):
            raise DataError("the copy's answers to held-out rows are no numbers.")
        largest = max(largest, difference)
    return Compared(
        n_rows=len(rows),
        largest_difference=largest,
        student=rows.measured(totals[0]),
        copy=rows.measured(totals[1]),
        student_rows_per_s=len(rows) / seconds[0],
        copy_rows_per_s=len(rows) / seconds[1],
    )


def of_torch(model: Any) -> Answer:
    """A ``transformers`` model on the CPU."""
    model.eval()
    options = models.no_cache(model)

    def answer(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tokens, attended = torch.from_numpy(input_ids), torch.from_numpy(mask)
            logits: torch.Tensor = model(
                input_ids=tokens, attention_mask=attended, **options
            ).logits
            return logits.float().numpy()

    return answer


def _some(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, MOST_ROWS)).astype(np.int64))


class HeldOutClasses:
    """Rows of class distributions, in tokens."""

    def __init__(self, rows: ClassRows, inputs: Inputs, student_dir: Path) -> None:
        """rows: one split's, at least one; inputs: what the student reads of them."""
        tokenizer = models.load_tokenizer(student_dir)
        self._rows = rows.take(_some(len(rows)))
        self._pad_id = tokenizer.pad_token_id or 0
        texts = inputs.all(self._rows.columns)
        self._tokens: TokenRows = tokenise(tokenizer, texts, tokenizer.model_max_length)

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self) -> Iterator[np.ndarray]:
        order = np.argsort(self._tokens.lengths, kind="stable")
        yield from np.array_split(order, -(-len(order) // _CLASSES_BATCH))

    def inputs(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens.padded(batch, self._pad_id)

    def logprobs(self, batch: np.ndarray, logits: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(logits).log_softmax(-1)

    def sums(self, batch: np.ndarray, logprobs: torch.Tensor) -> np.ndarray:
        """float64[4]: agreements, KL, rows with gold, right ones of them."""
        student = logprobs.double().numpy()
        teacher, gold = self._rows.logprobs[batch], self._rows.gold[batch]
        answer = student.argmax(axis=1)
        gap = np.where(np.isneginf(teacher), 0.0, teacher - student)
        agreed = (answer == teacher.argmax(axis=1)).sum()
        right = ((answer == gold) & (gold >= 0)).sum()
        return np.array([agreed, (np.exp(teacher) * gap).sum(), (gold >= 0).sum(), right])

    def measured(self, sums: np.ndarray) -> Measured:
        agreed, kl, n_gold, right = sums.tolist()
        return Measured(
            agreement=agreed / len(self),
            kl=kl / len(self),
            n_rows=len(self),
            gold_accuracy=right / n_gold if n_gold else None,
        )


class HeldOutTokens:
    """Rows of tokens, with the teacher's distributions where there are any."""

    def __init__(self, folder: Path, student_dir: Path) -> None:
        """folder: a split as ``token_rows.build`` wrote it."""
        self._rows = TokenDataset(folder)
        answers = np.flatnonzero(~self._rows.reasoning)  # as in training, which they stand beside
        self._chosen = answers[_some(len(answers))]
        tokenizer = models.load_tokenizer(student_dir)
        self._pad_id, self._vocabulary = tokenizer.pad_token_id or 0, len(tokenizer)

    def __len__(self) -> int:
        return len(self._chosen)

    def batches(self) -> Iterator[TokenBatch]:
        """Of as many rows as have logits of ``_LOGITS_BYTES`` together, one at least."""
        lengths = self._rows.lengths
        left = self._chosen[np.argsort(-lengths[self._chosen], kind="stable")]
        while len(left):
            room = _LOGITS_BYTES // (4 * int(lengths[left[0]]) * self._vocabulary)
            part, left = np.split(left, [min(max(1, room), _TOKENS_BATCH)])
            yield self._rows.batch(part)

    def inputs(self, batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
        input_ids, mask, _ = batch.padded(self._pad_id)
        return input_ids, mask

    def logprobs(self, batch: TokenBatch, logits: np.ndarray) -> torch.Tensor:
        _, _, at = batch.padded(self._pad_id)
        learned = torch.from_numpy(logits).flatten(0, 1)[torch.from_numpy(at)]
        return learned.log_softmax(-1)

    def sums(self, batch: TokenBatch, logprobs: torch.Tensor) -> np.ndarray:
        """float64[4]: tokens, agreement, KL or cross-entropy, -log P of the text."""
        targets = torch.from_numpy(batch.targets)
        nll = -logprobs.gather(1, targets[:, None]).double().sum().item()
        first = logprobs.argmax(-1)
        if batch.token_ids is None or batch.logprobs is None or self._rows.against == "text":
            return np.array([len(targets), (first == targets).sum().item(), nll, nll])
        assert batch.log_tail_mass is not None
        teacher = SparseTeacher(
            token_ids=torch.from_numpy(batch.token_ids),
            logprobs=torch.from_numpy(batch.logprobs),
            log_tail_mass=torch.from_numpy(batch.log_tail_mass),
            sampled=self._rows.sampled,
        )
        teacher = within(teacher, logprobs.shape[1])
        # A position with fewer entries has -1 behind its first ones.
        there = torch.where(teacher.token_ids < 0, teacher.token_ids[:, :1], teacher.token_ids)
        at = there.clamp_min(0)
        own = logprobs.gather(1, at)
        outside = logprobs.scatter(1, at, torch.where(there < 0, own, -math.inf))
        each = sparse_loss(own, outside.logsumexp(-1), teacher, _KL)
        loss, agreed = judged(each, first, teacher)
        sums = (values.double().sum().item() for values in (agreed, loss))
        return np.array([len(targets), *sums, nll])

    def measured(self, sums: np.ndarray) -> Measured:
        n_tokens, agreed, loss, nll = sums.tolist()
        against = self._rows.against
        return Measured(
            agreement=agreed / n_tokens,
            n_rows=len(self),
            against=against,
            kl=loss / n_tokens if against == "distributions" else None,
            cross_entropy=None if against == "distributions" else loss / n_tokens,
            perplexity=math.exp(nll / n_tokens),
        )
