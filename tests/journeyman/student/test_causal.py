"""Language models as students: where they start, and their output projection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student import causal

from .conftest import VOCABULARY, make_tiny_llama


def student(**settings: object) -> Student:
    return Student.model_validate({"model": "test/tiny", "kind": "causal", **settings})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tied") / "llama", layers=5)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("untied") / "llama", layers=5, tied=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=4, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


PROMPT = torch.tensor([[3, 7, 11, 2, 9]])


@pytest.mark.parametrize("kind", ["llama", "untied", "gpt2"])
def test_pruned_model_is_a_plain_one_of_the_layers_that_were_kept(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    there = whole.config.num_hidden_layers
    causal.build(folder, student(start="pruned", layers=3), seed=0).save_pretrained(tmp_path)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert pruned.config.num_hidden_layers == 3
    layers, kept = (_layers(m) for m in (whole, pruned))
    for number, layer in zip([0, round((there - 1) / 2), there - 1], kept, strict=True):
        for name, value in layer.named_parameters():
            assert value.equal(layers[number].get_parameter(name))
    torch.testing.assert_close(pruned.get_input_embeddings().weight,
                               whole.get_input_embeddings().weight)  # fmt: skip
    # Keys and values find their layer in the cache.
    with_cache, without = (
        pruned.generate(PROMPT, max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert with_cache.equal(without)


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


@pytest.mark.parametrize("kind", ["llama", "untied", "gpt2"])
def test_hidden_states_times_projection_are_the_models_own_logits(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = causal.load(request.getfixturevalue(kind)).eval()
    backbone, weight, bias = causal.backbone_and_head(model)
    with torch.no_grad():
        hidden = backbone(input_ids=PROMPT).last_hidden_state
        logits = hidden @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(logits, model(input_ids=PROMPT).logits)


def test_fresh_model_has_its_own_weights_and_the_changed_config(llama: Path) -> None:
    settings = student(start="fresh", layers=2, config={"hidden_size": 64})
    one, same = (causal.build(llama, settings, seed=1) for _ in range(2))
    assert one.config.num_hidden_layers == 2 and one.config.hidden_size == 64
    assert one.config.vocab_size == VOCABULARY
    assert all(a.equal(b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


def test_norms_are_not_decayed(llama: Path) -> None:
    model = causal.load(llama)
    matrices, vectors = causal.parameter_groups(model, 1e-3, 0.1)
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert {p.dim() for p in vectors["params"]} == {1}
    n_parameters = sum(len(group["params"]) for group in (matrices, vectors))
    assert n_parameters == len(list(model.parameters()))


def test_what_is_no_student_gets_a_sentence(llama: Path, tmp_path: Path, tiny_encoder) -> None:
    with pytest.raises(ModelError, match=r"student.layers is 9, and it has 5 layers"):
        causal.build(llama, student(start="pruned", layers=9), seed=0)
    with pytest.raises(ModelError, match=r"student\.model must name a causal one"):
        causal.load(tmp_path)
    capped = AutoModelForCausalLM.from_pretrained(llama)
    capped.config.final_logit_softcapping = 30.0
    capped.save_pretrained(tmp_path / "capped")
    with pytest.raises(ModelError, match="scales or caps logits"):
        causal.load(tmp_path / "capped")


def test_vocabularies_are_compared_token_by_token(
    llama: Path, tmp_path: Path, tiny_encoder
) -> None:
    assert causal.other_vocabulary(llama, llama) == ""
    swapped = make_tiny_llama(tmp_path / "swapped", layers=1, swap=True)
    assert "is 5 to the teacher and 6 to the student" in causal.other_vocabulary(swapped, llama)
    assert causal.other_vocabulary(tiny_encoder.path, llama)
