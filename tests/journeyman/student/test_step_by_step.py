"""Distilling step-by-step: both tasks of a row in one step, against a dense float64 computation
over the texts that a reader of the labels would write down."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from journeyman import recipe
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.student import token_rows
from journeyman.student.causal_learner import Causal
from journeyman.student.models import load_tokenizer
from journeyman.student.token_dataset import TokenDataset

from ..labels import synthetic as made
from .conftest import make_causal_recipe

# Question, reasoning, answer: of different lengths each.
TAUGHT = [
    ("w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10"),
    ("w2", "w11 w12", "w13 w14 w15"),
    ("w3 w3", "w16 w17 w18 w19", "w20 w21"),
]
HELD_OUT = ("w5 w6", "w22 w23 w24", "w25")


def settings(**training: object) -> Recipe:
    asked = {"kind": "rationales", "prompt": "the {{ text }}", "samples": 4}
    values = make_causal_recipe(workers=1, batch_size=2).model_dump(mode="json")
    values["training"] |= training
    return recipe.parse(values | {"labels": asked})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    shard = []
    for (question, reasoning, answer), agreed in zip(
        [*TAUGHT, HELD_OUT], (4, 3, 2, 4), strict=True
    ):
        said = made.rationales([answer] * agreed + ["w30"] * (4 - agreed))
        said = dataclasses.replace(said, reasoning=reasoning)
        split = "calibrate" if question == HELD_OUT[0] else "train"
        shard.append((made.row(question, split), said))
    made.write_dataset(folder, settings().labels, [shard])
    return folder


def learner(run: Path, llama: Model, folder: Path, **training: object) -> Causal:
    """In float64, without dropout."""
    asked = settings(**training)
    weighed = asked.training
    token_rows.build(
        run / "labels", run / "corpus", asked.labels, load_tokenizer(llama.path), 64, folder,
        as_text=True, row_weight=weighed.row_weight, reasonings=weighed.rationale_weight > 0,
    )  # fmt: skip
    made_of = Causal(
        None, torch.device("cpu"), model_dir=llama.path, student=asked.learner(),
        training=weighed, rows_dir=folder,
    )  # fmt: skip
    made_of.module.double().eval()
    return made_of


def text_loss(model: torch.nn.Module, tokenizer: object, prompt: str, said: str) -> torch.Tensor:
    """-log P of each of said's tokens and of the end behind it: float64[n]."""
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = [*tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]
    ids = torch.tensor([[*before, *after]])
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    at = torch.arange(len(before) - 1, ids.shape[1] - 1)
    return -logprobs[at, ids[0, at + 1]]


def by_hand(llama: Model, weight: float, agreements: list[float]) -> tuple[float, torch.nn.Module]:
    """The mean over all answers' tokens, plus weight times that over all reasonings' tokens."""
    tokenizer = load_tokenizer(llama.path)
    model = AutoModelForCausalLM.from_pretrained(llama.path).double().eval()
    sums, tokens, weights = [0.0, 0.0], [0, 0], [0.0, 0.0]
    for (question, reasoning, answer), agreement in zip(TAUGHT, agreements, strict=True):
        for task, (prefix, said) in enumerate((("[label] ", answer), ("[rationale] ", reasoning))):
            each = text_loss(model, tokenizer, f"{prefix}the {question}", said)
            sums[task] = sums[task] + agreement * each.sum()
            tokens[task] += len(each)
            weights[task] += agreement * len(each)
    # Row weights have a mean of 1 over what is learned.
    answers, reasonings = (s / w for s, w in zip(sums, weights, strict=True))
    loss = answers + weight * reasonings
    loss.backward()
    return loss.item(), model


def check_gradients(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    """To 1e-5 of each parameter's: norms inside the model are taken in float32."""
    found = dict(ours.named_parameters())
    for name, parameter in reference.named_parameters():
        apart = (found[name].grad - parameter.grad).norm()
        assert apart <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize(
    ("weight", "row_weight", "agreements"),
    [(1.0, "none", [1, 1, 1]), (0.3, "none", [1, 1, 1]), (2.5, "agreement", [1, 0.75, 0.5])],
)
def test_loss_and_gradient_are_answers_plus_weighted_reasonings(
    weight: float, row_weight: str, agreements: list[float], run: Path, tiny_llama: Model,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = learner(
        run, tiny_llama, tmp_path / "rows", rationale_weight=weight, row_weight=row_weight
    )
    assert len(found.row_ids) == len(found.lengths) == 3 and found.sizes.tolist() == [1, 1, 1]
    total, rows = 0.0, np.zeros(3)
    parts = [np.array([2, 0]), np.array([1])]
    for part, batch in zip(parts, found.batches(iter(parts)), strict=True):
        loss, of_rows = found.loss(found.module, batch)
        (loss / 3).backward()  # as a step over all three examples, in two parts
        total += loss.item() / 3
        rows[part] += of_rows.numpy()
    expected, model = by_hand(tiny_llama, weight, agreements)
    assert total == pytest.approx(expected, rel=1e-6)
    assert rows.sum() / 3 == pytest.approx(expected, rel=1e-6) and (rows > 0).all()
    check_gradients(found.module.model, model)


def test_without_reasonings_it_is_the_answers_term_alone(
    run: Path, tiny_llama: Model, tmp_path: Path
) -> None:
    alone = learner(run, tiny_llama, tmp_path / "rows", rationale_weight=0)
    (batch,) = alone.batches(iter([np.arange(3)]))
    loss, _ = alone.loss(alone.module, batch)
    (loss / alone.sizes.sum()).backward()
    expected, model = by_hand(tiny_llama, 0, [1, 1, 1])
    assert loss.item() / alone.sizes.sum() == pytest.approx(expected, rel=1e-6)
    check_gradients(alone.module.model, model)


def test_both_are_measured_on_answers_alone(run: Path, tiny_llama: Model, tmp_path: Path) -> None:
    both = learner(run, tiny_llama, tmp_path / "both")
    alone = learner(run, tiny_llama, tmp_path / "alone", rationale_weight=0)
    assert both.evaluate() == alone.evaluate()
    tokenizer = load_tokenizer(tiny_llama.path)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.path).double().eval()
    question, _, answer = HELD_OUT
    each = text_loss(model, tokenizer, f"[label] the {question}", answer)
    found = both.evaluate()
    assert found.cross_entropy == pytest.approx(each.mean().item(), rel=1e-5) and found.n_rows == 1


def test_an_answer_learned_by_heart_is_written_to_the_letter(
    run: Path, tiny_llama: Model, tmp_path: Path
) -> None:
    found = learner(run, tiny_llama, tmp_path / "rows")
    assert found.evaluate().exact_match == 0 and found.evaluate().gold_accuracy is None
    found._held_out = found._rows  # what is trained on
    optimizer = torch.optim.Adam(found.module.parameters(), 0.01)
    for _ in range(60):
        (batch,) = found.batches(iter([np.arange(3)]))
        optimizer.zero_grad()
        found.loss(found.module, batch)[0].backward()
        optimizer.step()
    assert found.evaluate().exact_match == 1
    tokenizer = load_tokenizer(tiny_llama.path)
    for question, _, answer in TAUGHT:
        asked = torch.tensor([tokenizer.encode(f"[label] the {question}")])
        written = found.module.model.generate(asked, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(written[0, asked.shape[1] :]) == f"{answer} <eos>"


def test_gold_answers_that_a_student_writes_are_the_share_that_is_right(
    tiny_llama: Model, tmp_path: Path
) -> None:
    """Of held-out rows, whatever the teacher said of them; two have none."""
    gold = {"w1 w2 w3": "w10", "w2": "w13 w14", "w3 w3": "w20 w21", "w4": None}
    shard = [(made.row(question), dataclasses.replace(made.rationales([answer]), reasoning=why))
             for question, why, answer in TAUGHT]  # fmt: skip
    held_out = [
        (made.row(question, "calibrate", label), made.rationales(["w30"]))
        for question, label in (*gold.items(), ("w5", None))
    ]
    for source, _ in held_out:
        source["id"] += "-held-out"
    made.write_dataset(tmp_path, settings().labels, [[*shard, *held_out]])
    found = learner(tmp_path, tiny_llama, tmp_path / "rows")
    optimizer = torch.optim.Adam(found.module.parameters(), lr=0.02)
    for _ in range(60):
        (batch,) = found.batches(iter([np.arange(3)]))
        optimizer.zero_grad()
        found.loss(found.module, batch)[0].backward()
        optimizer.step()
    tokenizer = load_tokenizer(tiny_llama.path)
    right = []
    for question, answer in gold.items():
        asked = torch.tensor([tokenizer.encode(f"[label] the {question}")])
        written = found.module.model.generate(asked, max_new_tokens=8, do_sample=False)
        if answer is not None:
            right.append(tokenizer.decode(written[0, asked.shape[1] :]) == f"{answer} <eos>")
    measured = found.evaluate()
    assert right == [True, False, True] and measured.gold_accuracy == 2 / 3
    assert measured.exact_match == 0 and measured.n_rows == 5


def test_a_right_answer_has_the_form_that_is_learned(tiny_llama: Model, tmp_path: Path) -> None:
    """The teacher's where it is right, and for a gold class the words that stand for it."""
    asked = recipe.parse(
        make_causal_recipe(workers=1).model_dump(mode="json")
        | {"labels": {"kind": "rationales", "prompt": "the {{ text }}", "samples": 1,
                      "classes": {"w9": "w10 w11", "w8": "w12"}}}
    ).labels  # fmt: skip
    said = {"w1": ("w9", "w9"), "w2": ("w12", "w9"), "w3": ("w12", None)}
    shard = [(made.row("w4"), made.rationales(["w12"]))]
    for question, (answer, gold) in said.items():
        shard.append((made.row(question, "calibrate", gold), made.rationales([answer])))
    made.write_dataset(tmp_path, asked, [shard])
    tokenizer = load_tokenizer(tiny_llama.path)

    def gold(folder: str, **kept: bool) -> list[str] | None:
        token_rows.build(tmp_path / "labels", tmp_path / "corpus", asked, tokenizer, 64,
                         tmp_path / folder, as_text=True, **kept)  # fmt: skip
        if not (tmp_path / folder / token_rows.GOLD).exists():
            return None
        rows = TokenDataset(tmp_path / folder / token_rows.GOLD)
        return [tokenizer.decode(rows.batch(np.array([i])).targets) for i in range(len(rows))]

    assert gold("rows") == ["w9 <eos>", "w10 w11 <eos>"]
    assert gold("none", gold=False) is None


def test_a_reasoning_that_was_cut_off_does_not_end(
    run: Path, tiny_llama: Model, tmp_path: Path
) -> None:
    said = [made.rationales(["w7"], finish_reason=reason) for reason in ("length", "stop")]
    shard = [(made.row("w1"), said[0]), (made.row("w2", "calibrate"), said[1])]
    asked = settings().labels
    made.write_dataset(tmp_path, asked, [shard])
    tokenizer = load_tokenizer(tiny_llama.path)
    token_rows.build(tmp_path / "labels", tmp_path / "corpus", asked, tokenizer, 64,
                     tmp_path / "rows", as_text=True)  # fmt: skip
    ends = {}
    for split in token_rows.SPLITS:
        rows = TokenDataset(tmp_path / "rows" / split)
        last = [rows.batch(np.array([i])).targets[-1] for i in range(2)]
        ends[split] = [token == tokenizer.eos_token_id for token in last]
    assert ends == {"train": [True, False], "calibrate": [True, True]}
