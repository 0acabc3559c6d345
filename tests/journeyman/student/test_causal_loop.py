"""A language model trained end to end: Ray Train, two workers, a teacher that counts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from journeyman.errors import DataError
from journeyman.models import Model
from journeyman.student import loop
from journeyman.student.causal_learner import Causal

from .conftest import make_causal_recipe, write_token_rows

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
