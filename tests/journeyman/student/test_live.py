"""What a running training says of itself: rates, FLOP, and the line for a person."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest
import torch
from ray.util import metrics
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from journeyman.models import Model
from journeyman.student import flops
from journeyman.student.checkpoints import Evaluation
from journeyman.student.gauges import Gauges
from journeyman.student.live import Pace, TrainProgress


def counted(model: PreTrainedModel, shape: tuple[int, int]) -> float:
    """FLOP of a step's matrix products, as torch counts them."""
    tokens = torch.arange(shape[0] * shape[1]).reshape(shape) % 20
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.float().square().sum().backward()
    return float(counter.get_total_flops())


def test_flop_of_a_language_model_are_those_that_torch_counts(tiny_llama: Model) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.path, attn_implementation="eager")
    work = flops.of_layers(model.model, model.config)
    lengths = np.array([12, 12, 12])
    head = flops.of_matrices([model.lm_head.weight]) * lengths.sum()
    assert work.of(lengths, lengths) + head == pytest.approx(counted(model, (3, 12)), rel=1e-3)


def test_flop_of_an_encoder_are_those_that_torch_counts(tiny_encoder: Model) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_encoder.path, num_labels=3, attn_implementation="eager"
    )
    work = flops.of_layers(model.base_model, model.config)
    own = work.of(np.array([12, 12, 12]), np.ones(3))
    # Pooler and head see one token of each row only.
    assert own == pytest.approx(counted(model, (3, 12)), rel=0.01)


def test_weights_that_do_not_learn_cost_two_thirds(tiny_llama: Model) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.path)
    learning = flops.of_layers(model.model, model.config).per_token
    model.requires_grad_(False)
    assert flops.of_layers(model.model, model.config).per_token == pytest.approx(learning * 2 / 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_go_by_the_devices_name(name: str, expected: float | None) -> None:
    assert flops.peak(name) == expected


def test_rates_are_of_the_last_steps_and_leave_pauses_out() -> None:
    now = 0.0
    pace = Pace(window_s=10.0, clock=lambda: now)
    for seconds, rows in ((2.0, 100), (5.0, 10), (4.0, 8)):
        now += seconds
        pace.add(rows, 10 * rows, 1000 * rows)
    # The first step lies more than ten seconds back.
    assert pace.rates().rows_per_s == pytest.approx(18 / 9)
    now += 100.0
    pace.go_on()
    now += 1.0
    pace.add(2, 20, 2000)
    found = pace.rates()
    assert found.tokens_per_s == pytest.approx(200 / 10)
    assert found.flops_per_s == pytest.approx(20_000 / 10)


def test_the_line_says_how_far_how_fast_and_how_long() -> None:
    progress = TrainProgress(
        step=30, total_steps=90, epoch=2, epochs=5, loss=0.1234, rows_per_s=1250.4,
        tokens_per_s=31_000.0, eta_s=125.0, mfu=0.412, agreement=0.9, evaluating=True,
    )  # fmt: skip
    assert progress.text().splitlines() == [
        "train     epoch 2/5, step 30/90, loss 0.123, 2:05 to go, evaluating",
        "          agreement 0.900, 1,250 rows/s, 31,000 tokens/s, MFU 41%",
    ]


def test_gauges_are_set_again_while_nothing_new_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of minutes, say: Ray forgets what is not set for twenty seconds."""
    told: list[tuple[str, float]] = []

    class Recorded(metrics.Gauge):
        def _record(self, value: float, tags: dict[str, str] | None = None) -> None:
            told.append((self.info["name"], value))

    monkeypatch.setattr(metrics, "Gauge", Recorded)
    with contextlib.closing(Gauges("run", again_s=0.01)) as gauges:
        gauges.show(
            TrainProgress(
                step=30, total_steps=90, epoch=2, epochs=5, loss=0.1, rows_per_s=9.0,
                tokens_per_s=80.0, eta_s=125.0,
            ),
            Evaluation(epoch=1, step=20, agreement=0.9, kl=0.2, n_rows=8),
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while told.count(("journeyman_train_step", 30)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert told.count(("journeyman_train_step", 30)) >= 3
    assert told.count(("journeyman_train_agreement", 0.9)) >= 2
    assert not {f"journeyman_train_{name}" for name in ("mfu", "perplexity")} & {n for n, _ in told}
