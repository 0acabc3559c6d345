"""What held-out figures are of, and what they are called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from transformers import AutoModelForCausalLM

from journeyman.labels.codec import Codec
from journeyman.models import Model
from journeyman.recipe import Recipe, Training, parse
from journeyman.student import export, token_dataset
from journeyman.student.causal_learner import Causal
from journeyman.student.checkpoints import Evaluation, State
from journeyman.student.formats import held_out
from journeyman.student.formats.held_out import HeldOutTokens
from journeyman.student.learner import Measured
from journeyman.student.live import TrainProgress
from journeyman.student.plan import Plan
from journeyman.student.token_dataset import TokenRow

from .conftest import VOCABULARY, make_causal_recipe

TEXT = np.array([5, 9, 12, 30, 7, 21])
N, DRAWS = 400, 8  # rows, and draws a position: few, so that their counts' own KL is far off
LABELS = {
    "draws": {"kind": "logits", "codec": "sampled", "k": DRAWS},
    "text": {"kind": "generate", "prompt": "{{ text }}"},
}


def rows_of(folder: Path, codec: Codec | None, logprobs: np.ndarray) -> Path:
    """One text over and over; of each, other draws from float64[positions, v]."""
    random = np.random.default_rng(1)
    for split, n in (("train", 2), ("calibrate", N)):
        noise = random.gumbel(size=(n, DRAWS, *logprobs.shape))
        draws = (logprobs + noise).argmax(-1).transpose(0, 2, 1)
        rows = (
            TokenRow(
                id=f"{split}-{i}", tokens=TEXT, first=1,
                payload=codec and codec.encode(draws[i], np.zeros(0)),
                n_encoded=len(TEXT) - 1 if codec else 0,
            )
            for i in range(n)
        )  # fmt: skip
        token_dataset.write(folder / split, rows, codec)
    return folder


def measured(folder: Path, model: Path, recipe: Recipe) -> Measured:
    given = {"model_dir": model, "student": recipe.learner(), "training": recipe.training}
    return Causal(None, torch.device("cpu"), rows_dir=folder, **given).evaluate()


def in_double(model: Path) -> np.ndarray:
    """float64[positions, v], the student's log-probabilities."""
    student = AutoModelForCausalLM.from_pretrained(model).double().eval()
    with torch.no_grad():
        logits = student(input_ids=torch.tensor(TEXT[None])).logits
    return logits[0, :-1].log_softmax(-1).numpy()


def test_draws_give_cross_entropy_and_their_share_without_bias(
    tiny_llama: Model, tmp_path: Path
) -> None:
    teacher = log_softmax(
        2 * np.random.default_rng(0).normal(size=(len(TEXT) - 1, VOCABULARY)), axis=1
    )
    codec = Codec(name="sampled", vocab_size=VOCABULARY, k=DRAWS)
    folder = rows_of(tmp_path, codec, teacher)
    found = measured(folder, tiny_llama.path, make_causal_recipe())
    assert found.kl is None and found.against == "draws" and found.n_rows == N

    p, student = np.exp(teacher), in_double(tiny_llama.path)
    n_draws = N * DRAWS  # of each position
    positions = np.arange(len(p))
    for got, each in (
        (found.cross_entropy, -student),
        (found.agreement, np.eye(VOCABULARY)[student.argmax(1)]),
    ):
        mean = (p * each).sum(1)
        variance = (p * each**2).sum(1) - mean**2
        error = np.sqrt(variance.sum() / n_draws) / len(positions)
        assert got == pytest.approx(mean.mean(), abs=4 * error)
    rows = HeldOutTokens(folder / "calibrate", tiny_llama.path)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.path)
    answers = held_out.of_torch(model)
    again = held_out.compare(rows, answers, answers).student
    assert (again.agreement, again.cross_entropy) == pytest.approx(
        (found.agreement, found.cross_entropy), rel=1e-5
    )
    assert again.kl is None and again.against == "draws"


def test_a_teacher_with_a_wider_output_layer_is_learned(tiny_llama: Model, tmp_path: Path) -> None:
    """As one that is padded to a multiple of 128, say."""
    wide = VOCABULARY + 10
    random = np.random.default_rng(0)
    teacher = log_softmax(2 * random.normal(size=(len(TEXT) - 1, wide)), axis=1)
    codec = Codec(name="topk_fp16", vocab_size=wide, k=8)
    ids = np.argsort(-teacher, axis=1)[:, :8]
    assert (ids >= VOCABULARY).any()
    payload = codec.encode(ids, np.take_along_axis(teacher, ids, axis=1).astype(np.float32))
    row = TokenRow(
        id="a", tokens=TEXT, first=1, payload=payload, n_encoded=len(TEXT) - 1
    )  # fmt: skip
    for split in ("train", "calibrate"):
        token_dataset.write(tmp_path / split, [row], codec)
    student, expected = np.exp(in_double(tiny_llama.path)), []
    for i, p in enumerate(np.exp(teacher)):
        known = [token for token in ids[i] if token < VOCABULARY]
        sides = [np.array([*x[known], 1 - x[known].sum()]) for x in (p, student[i])]
        expected.append(rel_entr(*sides).sum())
    recipe = make_causal_recipe()
    given = {"model_dir": tiny_llama.path, "student": recipe.learner()}
    learner = Causal(
        None, torch.device("cpu"), rows_dir=tmp_path, training=recipe.training, **given
    )
    (batch,) = learner.batches(iter([np.array([0])]))
    loss, _ = learner.loss(learner.module, batch)
    loss.backward()
    assert loss.item() / len(expected) == pytest.approx(np.mean(expected), abs=2e-3)
    assert all(p.grad.isfinite().all() for p in learner.module.parameters())
    assert learner.evaluate().kl == pytest.approx(np.mean(expected), abs=2e-3)  # fp16 record
    rows = HeldOutTokens(tmp_path / "calibrate", tiny_llama.path)
    answers = held_out.of_torch(AutoModelForCausalLM.from_pretrained(tiny_llama.path))
    assert held_out.compare(rows, answers, answers).copy.kl == pytest.approx(
        np.mean(expected), abs=2e-3
    )


def test_a_text_alone_gives_cross_entropy_and_no_kl(tiny_llama: Model, tmp_path: Path) -> None:
    folder = rows_of(tmp_path, None, np.zeros((len(TEXT) - 1, VOCABULARY)))
    found = measured(folder, tiny_llama.path, make_causal_recipe())
    student = in_double(tiny_llama.path)
    of_text = student[np.arange(len(student)), TEXT[1:]]
    assert found.kl is None and found.against == "text"
    assert found.cross_entropy == pytest.approx(-of_text.mean(), rel=1e-5)
    assert found.agreement == pytest.approx((student.argmax(1) == TEXT[1:]).mean())


def card_of(recipe: Recipe, best: Evaluation, parent: Model, folder: Path) -> str:
    state = State(step=3, total_steps=3, seconds=1.0, n_rows=9, evaluations=(best,))
    origin = export.Provenance(
        recipe=recipe, parent=parent, inputs="i", labels_digest="l", world_size=1, hardware={}
    )
    (folder / "model").mkdir()
    (folder / "curve").write_text("")
    export.write(folder / "out", folder / "model", folder / "curve", best, state, origin)
    return (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("against", "loss", "agreement", "learned"),
    [
        ("draws", "cross-entropy from the teacher, by its draws", "the teacher's draws",
         "`forward_kl` by true draws"),
        ("text", "cross-entropy of the text's own tokens", "the text's own tokens",
         "cross-entropy on the teacher's own words"),
    ],
)  # fmt: skip
def test_a_card_calls_figures_what_they_are(
    against: str, loss: str, agreement: str, learned: str, tiny_llama: Model, tmp_path: Path
) -> None:
    values = make_causal_recipe().model_dump(mode="json") | {"labels": LABELS[against]}
    best = Evaluation(
        epoch=1, step=3, agreement=0.25, n_rows=4, against=against, cross_entropy=1.5, perplexity=2
    )
    card = card_of(parse(values), best, tiny_llama, tmp_path)
    assert f"| agreement with {agreement} | 0.250 |" in card
    assert f"| {loss}, nats a token | 1.500 |" in card
    assert learned in card and "KL(" not in card


@pytest.mark.parametrize(
    ("share", "learned", "not_learned"),
    [
        (0.0, "`forward_kl`", "cross-entropy"),
        (0.3, "0.3 of the loss cross-entropy on the text's own tokens", "1 of the loss"),
        (1.0, "cross-entropy on the text's own tokens", "`forward_kl`"),
    ],
)
def test_a_card_says_what_share_of_the_loss_is_cross_entropy(
    share: float, learned: str, not_learned: str, tiny_llama: Model, tmp_path: Path
) -> None:
    best = Evaluation(epoch=1, step=3, agreement=0.25, n_rows=4, kl=1.5, perplexity=2)
    card = card_of(make_causal_recipe(cross_entropy=share), best, tiny_llama, tmp_path)
    assert learned in card and not_learned not in card


def test_the_best_is_the_lowest_loss_also_of_a_run_that_called_it_kl() -> None:
    def at(step: int, **figures: float) -> Evaluation:
        return Evaluation(epoch=1, step=step, agreement=0.5, n_rows=9, perplexity=9.0, **figures)

    older, newer = at(1, kl=2.0), at(2, cross_entropy=1.8)
    state = State(
        step=3, total_steps=9, seconds=1.0, n_rows=9,
        evaluations=(older, newer, at(3, cross_entropy=1.9)),
    )  # fmt: skip
    assert state.best == newer


def test_a_run_that_estimated_kl_from_draws_picks_among_what_it_measures_since() -> None:
    """The estimate is lower than the cross-entropy that came in its place, whatever was learned."""

    def at(step: int, **figures: Any) -> Evaluation:
        return Evaluation(epoch=1, step=step, agreement=0.5, n_rows=9, perplexity=9.0, **figures)

    older = [at(1, kl=0.3), at(2, kl=0.4)]
    newer = [at(i, cross_entropy=x, against="draws") for i, x in ((3, 1.9), (4, 1.8), (5, 1.85))]
    begun = State(step=2, total_steps=9, seconds=1.0, n_rows=9, evaluations=tuple(older))
    assert begun.best == older[0]
    assert dataclasses.replace(begun, evaluations=(*older, *newer)).best == newer[1]
    plan = Plan.of(Training(patience=2, epochs=1), 9)
    assert not plan.gives_up([*older, *newer])
    assert plan.gives_up([*older, *newer, at(6, cross_entropy=1.9, against="draws")])


def test_the_live_line_says_what_the_student_agrees_with() -> None:
    line = TrainProgress(
        step=3, total_steps=9, epoch=1, epochs=1, loss=1.0, rows_per_s=9.0, tokens_per_s=80.0,
        eta_s=1.0, agreement=0.4, perplexity=7.0,
    )  # fmt: skip
    assert "agreement 0.400, perplexity" in line.text()
    of_text = dataclasses.replace(line, against="text")
    assert "agreement with the text's own tokens 0.400, perplexity" in of_text.text()
