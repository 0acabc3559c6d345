"""A language model trained end to end: Ray Train, two workers, a teacher that counts."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from journeyman.errors import DataError
from journeyman.models import Model
from journeyman.student import loop, models, projection, pruning
from journeyman.student.causal_learner import Causal, objective
from journeyman.student.checkpoints import Checkpoints, Evaluation, State

from .conftest import VOCABULARY, make_causal_recipe, write_token_rows

RECIPE = make_causal_recipe(epochs=12, batch_size=16, accumulate=2)


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None, tiny_llama: Model, tmp_path_factory: pytest.TempPathFactory
) -> loop.TrainResult:
    folder = tmp_path_factory.mktemp("trained")
    write_token_rows(folder / "rows", n_train=150, n_calibrate=30)
    load = partial(
        Causal,
        model_dir=tiny_llama.path,
        student=RECIPE.learner(),
        training=RECIPE.training,
        rows_dir=folder / "rows",
    )
    return loop.train(
        RECIPE, load, tiny_llama, folder / "student", inputs="abc", labels_digest="labels"
    )


def test_student_learns_to_count(trained: loop.TrainResult) -> None:
    first, best = trained.evaluations[0], trained.best
    assert best.kl == min(e.kl for e in trained.evaluations) < 0.5 * first.kl
    assert best.agreement > 0.6 and best.perplexity < first.perplexity
    assert [e.step for e in trained.evaluations] == list(range(10, 121, 10))
    lines = (trained.path / "training.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["kind"] == "steps"]
    assert [r["step"] for r in steps] == list(range(1, 12 * 10 + 1))


def test_exported_folder_writes_with_plain_transformers(trained: loop.TrainResult) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.path)
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    prompt = torch.tensor([tokenizer.encode("w20 w21 w22")])
    written = model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(written[0]) == "w20 w21 w22 w23 w24"
    card = (trained.path / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and f"{trained.best.kl:.3f}" in card


@pytest.mark.slow
def test_a_row_with_damaged_labels_stops_the_run_by_name(
    ray_cluster: None, tiny_llama: Model, tmp_path: Path
) -> None:
    write_token_rows(tmp_path / "rows", n_train=20, n_calibrate=4)
    payloads = tmp_path / "rows" / "train" / "payloads.bin"
    data = bytearray(payloads.read_bytes())
    data[5] ^= 0xFF
    payloads.write_bytes(bytes(data))
    recipe = make_causal_recipe(workers=1, epochs=1, batch_size=16, max_failures=0)
    load = partial(
        Causal,
        model_dir=tiny_llama.path,
        student=recipe.learner(),
        training=recipe.training,
        rows_dir=tmp_path / "rows",
    )
    with pytest.raises(DataError, match="the labels of row train-0"):
        loop.train(
            recipe, load, tiny_llama, tmp_path / "student", inputs="d", labels_digest="labels"
        )


def learner(model: Model, folder: Path | None, rows: Path, **student: object) -> Causal:
    recipe = make_causal_recipe(student, activation_checkpointing=True)
    return Causal(
        folder, torch.device("cpu"), model_dir=model.path, student=recipe.learner(),
        training=recipe.training, rows_dir=rows,
    )  # fmt: skip


def one_step(of: Causal) -> float:
    """The loss, before a step of plain gradient descent."""
    of.module.eval()
    loss, _ = of.loss(of.module, next(of.batches(iter([torch.arange(8).numpy()]))))
    loss.backward()
    with torch.no_grad():
        for parameter in of.module.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None
    return loss.item()


def test_a_checkpoint_of_low_rank_matrices_holds_them_alone_and_is_merged_for_export(
    ray_cluster: None, tiny_llama: Model, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    write_token_rows(tmp_path / "rows", n_train=8, n_calibrate=2)

    def resumed() -> Causal:
        return learner(tiny_llama, tmp_path / "saved", tmp_path / "rows", lora={"rank": 4})

    first = learner(tiny_llama, None, tmp_path / "rows", lora={"rank": 4})
    before = one_step(first)
    first.write(models.copy_on_cpu(first.module), tmp_path / "saved")
    (matrices,) = (tmp_path / "saved").iterdir()
    learning = [p for p in first.module.parameters() if p.requires_grad]
    assert matrices.stat().st_size < sum(p.nbytes for p in learning) + 20_000
    work = Checkpoints.claim(tmp_path / ".student-work-lora")
    work.start_curve(0)
    found = Evaluation(epoch=1, step=1, agreement=1.0, kl=0.1, n_rows=2, perplexity=1.1)
    ended = State(step=1, total_steps=1, seconds=1.0, n_rows=8, evaluations=(found,))
    work.save(ended, lambda folder: first.write(first.module, folder / "model"), n_bytes=1)

    def merging(folder: Path | None, _: torch.device) -> Causal:
        ours = learner(tiny_llama, folder, tmp_path / "rows", lora={"rank": 4})
        export = ours.export

        def exported(folder: Path) -> None:
            export(folder)
            assert work.latest() == ended  # whoever is killed here finds it whole

        ours.export = exported  # type: ignore[method-assign]
        return ours

    loop.train(
        make_causal_recipe({"lora": {"rank": 4}}), merging,
        tiny_llama, tmp_path / "student", inputs="lora", labels_digest="labels",
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        ours = first.module.model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-5)
    again, after = resumed(), one_step(first)
    assert one_step(again) == after < before  # to the bit


def test_no_tensor_of_positions_by_vocabulary_is_made_to_evaluate(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows, in batches of 16, of 4 to 11 tokens: 100 learned positions or so to a batch."""
    write_token_rows(tmp_path, 4, 64)
    monkeypatch.setattr(projection, "_CHUNK_CPU", 40 * 4 * VOCABULARY)  # forty at a time
    watched = Widest()
    with watched:
        cut = learner(tiny_llama, None, tmp_path).evaluate()
    assert watched.positions == 40
    monkeypatch.undo()
    whole = learner(tiny_llama, None, tmp_path).evaluate()
    for name in ("kl", "perplexity", "agreement", "exact_match"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_no_tensor_of_positions_by_vocabulary_is_made_to_learn(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_token_rows(tmp_path, 16, 4)
    monkeypatch.setattr(projection, "_CHUNK_CPU", 40 * 4 * VOCABULARY)  # forty at a time
    of = learner(tiny_llama, None, tmp_path)
    (batch,) = of.batches(iter([np.arange(16)]))
    assert len(batch.targets) > 80
    watched = Widest()
    with watched:
        loss, _ = of.loss(of.module, batch)
        loss.backward()
    assert watched.positions == 40


def test_the_objective_is_the_recipes() -> None:
    asked = {"divergence": "skewed_kl", "tail": "renormalised", "temperature": 3.0, "beta": 0.2,
             "skew": 0.4, "cross_entropy": 0.3, "label_smoothing": 0.05}  # fmt: skip
    assert dataclasses.asdict(objective(make_causal_recipe(**asked).training)) == asked


class Widest(TorchDispatchMode):
    """The most positions of any tensor whose last dimension is the vocabulary."""

    positions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (VOCABULARY,):
                self.positions = max(self.positions, each.numel() // VOCABULARY)
        return made


def test_layers_are_chosen_on_the_train_rows(tiny_llama: Model, tmp_path: Path) -> None:
    write_token_rows(tmp_path / "rows", n_train=8, n_calibrate=2)
    settings = {"start": "pruned", "layers": 1, "layer_choice": "similarity"}
    pruned = learner(tiny_llama, None, tmp_path / "rows", **settings)
    assert pruned.module.model.config.num_hidden_layers == 1


def test_low_rank_matrices_go_on_with_the_layers_that_they_are_of(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a measurement would choose by now."""
    pytest.importorskip("peft")
    write_token_rows(tmp_path / "rows", n_train=8, n_calibrate=2)
    settings = {"start": "pruned", "layers": 1, "layer_choice": "similarity", "lora": {"rank": 4}}
    rows, whole = tmp_path / "rows", AutoModelForCausalLM.from_pretrained(tiny_llama.path)
    for chosen in (0, 1):
        monkeypatch.setattr(pruning, "chosen", lambda *_, chosen=chosen: [chosen])
        first = learner(tiny_llama, None, rows, **settings)
        first.write(models.copy_on_cpu(first.module), tmp_path / f"saved-{chosen}")
    for chosen in (0, 1):
        again = learner(tiny_llama, tmp_path / f"saved-{chosen}", rows, **settings)
        again.write(models.copy_on_cpu(again.module), tmp_path / f"again-{chosen}")
        learner(tiny_llama, tmp_path / f"again-{chosen}", rows, **settings).export(
            tmp_path / f"plain-{chosen}"
        )
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"plain-{chosen}")
        (layer,), expected = plain.model.layers, whole.model.layers[chosen]
        torch.testing.assert_close(layer.mlp.up_proj.weight, expected.mlp.up_proj.weight)
