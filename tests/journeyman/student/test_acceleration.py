"""bf16 and compiled students against plain float32 ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from journeyman.errors import ModelError
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.student import lesson, models
from journeyman.student.causal_learner import Causal
from journeyman.student.classifying import Classifying
from journeyman.student.learner import Learner
from journeyman.student.lesson import Load, Task

from .conftest import make_causal_recipe, make_recipe, make_rows, reader, write_token_rows

CPU = torch.device("cpu")
BATCHES = [np.arange(6), np.arange(6, 9), np.arange(2)]  # of other shapes each


@pytest.fixture(scope="module")
def rows_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_token_rows(folder, n_train=12, n_calibrate=6)
    return folder


def loads(kind: str, encoder: Model, llama: Model, rows_dir: Path, **training: object) -> Load:
    if kind == "classifier":
        recipe: Recipe = make_recipe(**training)
        own = {
            "model_dir": encoder.path,
            "read_rows": reader(make_rows(12, 6), encoder.path, recipe),
        }
        return partial(Classifying, student=recipe.learner(), training=recipe.training, **own)
    recipe = make_causal_recipe(**training)
    own = {"model_dir": llama.path, "rows_dir": rows_dir}
    return partial(Causal, student=recipe.learner(), training=recipe.training, **own)


def begun(load: Load) -> Learner:
    """As a worker does."""
    given = load.keywords["training"]
    return lesson.load(Task(training=given, checkpoints=None, load=load), None, CPU)


def learned(load: Load) -> tuple[list[float], dict[str, torch.Tensor], float]:
    """Losses of the batches, the gradients of their sum by name, and KL on held-out rows."""
    learner = begun(load)
    for module in learner.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    learner.module.train()
    losses = []
    for batch in learner.batches(iter(BATCHES)):
        loss, _ = learner.loss(learner.module, batch)
        loss.backward()
        losses.append(loss.item())
    gradients = {n: p.grad for n, p in learner.module.named_parameters() if p.grad is not None}
    return losses, gradients, learner.evaluate().kl


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_bf16_is_float32_but_for_its_rounding(
    kind: str, tiny_encoder: Model, tiny_llama: Model, rows_dir: Path
) -> None:
    make = partial(loads, kind, tiny_encoder, tiny_llama, rows_dir)
    full, half = learned(make()), learned(make(precision="bf16"))
    assert half[0] == pytest.approx(full[0], rel=0.02) and half[0] != full[0]
    assert half[2] == full[2]  # evaluations are float32
    for name, gradient in full[1].items():
        assert half[1][name].dtype == torch.float32
        if gradient.norm() > 1e-4:
            cosine = torch.cosine_similarity(half[1][name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.98, name
    assert learned(make(precision="fp32"))[0] == full[0]  # what auto is on the CPU


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_layers_that_are_computed_twice_learn_the_same(
    kind: str, tiny_encoder: Model, tiny_llama: Model, rows_dir: Path
) -> None:
    make = partial(loads, kind, tiny_encoder, tiny_llama, rows_dir)
    plain, twice = learned(make()), learned(make(activation_checkpointing=True))
    assert twice[0] == plain[0] and twice[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(twice[1][name], gradient)
    learner = make(activation_checkpointing=True)(None, CPU)
    (batch,) = learner.batches(iter(BATCHES[:1]))
    loss, _ = learner.loss(learner.module.train(), batch)
    model = learner.module
    layer = model.bert.encoder.layer[0] if kind == "classifier" else model.model.model.layers[0]
    again: list[object] = []
    next(layer.children()).register_forward_pre_hook(lambda *_: again.append(None))
    loss.backward()
    assert again  # in backward


@pytest.mark.slow  # half a minute each, for the compiler
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("classifier", {}),
        ("causal", {}),
        ("classifier", {"activation_checkpointing": True}),
        ("causal", {"activation_checkpointing": True}),
    ],
)
def test_a_compiled_student_learns_the_same(
    kind: str,
    more: dict[str, object],
    tiny_encoder: Model,
    tiny_llama: Model,
    rows_dir: Path,
    tmp_path: Path,
) -> None:
    make = partial(loads, kind, tiny_encoder, tiny_llama, rows_dir, **more)
    plain = learned(make())
    counters.clear()
    compiled = learned(make(compile=True))
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    assert compiled[2] == pytest.approx(plain[2], rel=1e-5)
    assert compiled[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-3, atol=1e-5)
    learner = begun(make(compile=True))
    learner.write(models.copy_on_cpu(learner.module), tmp_path / "model")
    again = make()(tmp_path / "model", CPU)
    for name, value in learner.module.state_dict().items():
        torch.testing.assert_close(again.module.state_dict()[name], value, rtol=0, atol=0)


def test_where_nothing_can_be_compiled_a_sentence_says_so(
    tiny_encoder: Model, tiny_llama: Model, rows_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nand so on")

    monkeypatch.setattr(torch, "compile", broken)
    load = loads("causal", tiny_encoder, tiny_llama, rows_dir, compile=True)
    with pytest.raises(ModelError, match=r"training.compile: .* no working C\+\+ compiler found"):
        begun(load)
    # What is loaded for an export is not compiled: the driver may have no compiler.
    load(None, CPU)
