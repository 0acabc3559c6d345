"""Language models as students: where they start, and their output projection."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from journeyman.errors import ModelError
from journeyman.recipe import Student
from journeyman.student import causal, lora, pruning, step, vocabulary
from journeyman.student.models import load_tokenizer

from .conftest import VOCABULARY, make_causal_recipe, make_tiny_llama


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


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of two kinds in turn, and as many ends of a text as layers."""
    folder = tmp_path_factory.mktemp("qwen3") / "qwen3"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=3, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"] * 2, eos_token_id=[0, 1, 2, 3],
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
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
    for one, other in zip(_outside_layers(whole), _outside_layers(pruned), strict=True):
        assert one.equal(other)
    tied = pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight
    assert tied == whole.config.tie_word_embeddings
    # Keys and values find their layer in the cache.
    with_cache, without = (
        pruned.generate(PROMPT, max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert with_cache.equal(without)


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def _outside_layers(model: torch.nn.Module) -> list[torch.Tensor]:
    inside = {id(p) for p in _layers(model).parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def test_pruned_layers_stay_of_their_kind_and_other_lists_stay_whole(
    qwen3: Path, tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(qwen3).eval()
    pruned = causal.build(qwen3, student(start="pruned", layers=3), seed=0).eval()
    full, sliding = "full_attention", "sliding_attention"
    assert pruned.config.layer_types == [sliding, sliding, full]
    assert pruned.config.eos_token_id == [0, 1, 2, 3]
    assert [layer.self_attn.layer_idx for layer in _layers(pruned)] == [0, 1, 2]
    # By hand: the whole model with its second layer taken out.
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in (0, 2, 3))
    whole.config.num_hidden_layers, whole.config.layer_types = 3, [sliding, sliding, full]
    with torch.no_grad():
        by_hand = whole(input_ids=PROMPT, use_cache=False).logits
        torch.testing.assert_close(pruned(input_ids=PROMPT).logits, by_hand)


TEXTS = ["w1 w2 w3 w4", "", "the w9 is w8 w7 w30"]


def test_by_similarity_a_layer_that_does_nothing_goes_first(llama: Path, tmp_path: Path) -> None:
    idle = AutoModelForCausalLM.from_pretrained(llama)
    for number, layer in enumerate(idle.model.layers):
        # Random layers of equal size are hard to tell apart; these change ever more.
        layer.self_attn.o_proj.weight.data *= 3 + number
        layer.mlp.down_proj.weight.data *= 3 + number
    last = idle.model.layers[4]
    last.self_attn.o_proj.weight.data.zero_()
    last.mlp.down_proj.weight.data.zero_()
    idle.save_pretrained(tmp_path)
    load_tokenizer(llama).save_pretrained(tmp_path)

    influence = pruning.block_influence(idle, tmp_path, TEXTS, max_length=16)
    assert influence.shape == (5,) and influence.argmin() == 4
    np.testing.assert_allclose(influence[4], 0, atol=1e-6)
    np.testing.assert_allclose(influence[:4], _influence_by_outputs(idle, tmp_path), atol=1e-5)
    settings = student(start="pruned", layers=4, layer_choice="similarity")
    pruned = causal.build(
        tmp_path, settings, 0, lambda model: pruning.chosen(model, tmp_path, settings, TEXTS)
    ).eval()
    for one, other in zip(pruned.model.layers, idle.model.layers, strict=False):
        assert one.mlp.up_proj.weight.equal(other.mlp.up_proj.weight)
    with torch.no_grad():
        same = pruned(input_ids=PROMPT).logits, idle.eval()(input_ids=PROMPT).logits
    torch.testing.assert_close(*same)


def _influence_by_outputs(model: torch.nn.Module, folder: Path) -> np.ndarray:
    """Of all layers but the last, whose output is not among a model's hidden states."""
    cosines: list[torch.Tensor] = []
    for text in filter(None, TEXTS):
        ids = load_tokenizer(folder)(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states)[:-1]
        cosines.append(torch.cosine_similarity(states[:-1], states[1:], dim=-1)[:, 0])
    return 1 - torch.cat(cosines, dim=1).mean(1).numpy()


def test_similarity_without_texts_is_refused(llama: Path) -> None:
    settings = student(start="pruned", layers=4, layer_choice="similarity")
    with pytest.raises(ModelError, match="measures layers on sample texts, and there are none"):
        causal.build(
            llama, settings, 0, lambda model: pruning.chosen(model, llama, settings, ["", " "])
        )


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_padding_behind_a_text_changes_nothing_in_it_without_a_mask(
    kind: str, request: pytest.FixtureRequest
) -> None:
    backbone, _, _ = causal.backbone_and_head(causal.load(request.getfixturevalue(kind)).eval())
    padded = torch.cat([PROMPT, torch.zeros_like(PROMPT)], dim=1).repeat(2, 1)
    padded[1] = torch.arange(10) + 5
    with torch.no_grad():
        alone = backbone(input_ids=PROMPT).last_hidden_state[0]
        beside = backbone(input_ids=padded).last_hidden_state[0, : PROMPT.shape[1]]
    torch.testing.assert_close(beside, alone)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "both")
    config = json.loads((llama / "config.json").read_text()) | {"is_causal": False}
    (tmp_path / "both" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        causal.load(tmp_path / "both")


def test_fresh_model_has_its_own_weights_and_the_changed_config(llama: Path) -> None:
    settings = student(start="fresh", layers=2, config={"hidden_size": 64})
    one, same = (causal.build(llama, settings, seed=1) for _ in range(2))
    assert one.config.num_hidden_layers == 2 and one.config.hidden_size == 64
    assert one.config.vocab_size == VOCABULARY
    assert all(a.equal(b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


def test_fresh_layers_repeat_the_pattern_of_the_config(qwen3: Path) -> None:
    settings = student(start="fresh", layers=5, config={"intermediate_size": 48})
    fresh = causal.build(qwen3, settings, seed=1)
    full, sliding = "full_attention", "sliding_attention"
    assert fresh.config.layer_types == [sliding, full, sliding, full, sliding]
    assert len(_layers(fresh)) == 5
    assert _layers(fresh)[0].mlp.up_proj.weight.shape == (48, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hiden_size": 64}, r"student\.config\.hiden_size: .* did you mean hidden_size\?"),
        ({"vocab_size": 20}, "vocab_size is 20, and its tokenizer knows 50"),
        ({"hidden_size": "wide"}, "student.config"),
    ],
)
def test_config_that_makes_no_model_gets_a_sentence(
    llama: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        causal.build(llama, student(start="fresh", config=changes), seed=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_low_rank_matrices_learn_alone_and_merge_into_a_plain_model(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("peft")
    folder = request.getfixturevalue(kind)
    settings = student(start="pruned", layers=2, lora={"rank": 2, "alpha": 4})
    model = causal.build(folder, settings, seed=0)
    matrices, vectors = causal.parameter_groups(model, 1e-1, 0.0)
    assert not vectors["params"]
    assert {2} == {min(p.shape) for p in matrices["params"]}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step() -> None:
        backbone, weight, _ = causal.backbone_and_head(model)
        hidden = backbone(input_ids=PROMPT).last_hidden_state
        (hidden @ weight.T).logsumexp(-1).sum().backward()
        torch.optim.SGD([matrices], lr=0.1).step()

    step()
    moved = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    assert moved and all("lora_" in name for name in moved)
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=PROMPT).logits
        backbone, weight, _ = causal.backbone_and_head(model)
        hidden = backbone(input_ids=PROMPT).last_hidden_state
        torch.testing.assert_close(hidden @ weight.T, wanted)
    lora.merged(copy.deepcopy(model)).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=PROMPT).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(input_ids=PROMPT).logits, wanted)
    step()  # merging a copy has left the model that trains as it was


def test_a_plain_model_is_merged_already(llama: Path) -> None:
    model = causal.load(llama)
    assert lora.merged(model) is model


def test_low_rank_matrices_that_cannot_be_get_a_sentence(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ModelError, match=r"check student\.lora\.target_modules"):
        causal.build(llama, student(lora={"target_modules": ["nothing"]}), seed=0)
    with pytest.raises(ModelError, match="names the embeddings or the output projection"):
        causal.build(llama, student(lora={"target_modules": ["lm_head"]}), seed=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs the package peft .* pip install .*lora"):
        causal.build(llama, student(lora={}), seed=0)
    asked = make_causal_recipe({"lora": {}})
    with pytest.raises(ModelError, match="where the run is started, which merges"):  # before rows
        step.train(
            asked, llama / "no", llama / "no", None, None, llama / "student", inputs="i",
            labels_digest="l", on_progress=lambda _: None,
        )  # fmt: skip


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
    with pytest.raises(ModelError, match=r"lacks \d+ weights of a BertLMHeadModel"):
        causal.load(tiny_encoder.path)


def test_models_without_a_plain_projection_get_a_sentence(untied: Path, tmp_path: Path) -> None:
    small = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**small, intermediate_size=32)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="are not its last hidden states times"):
        causal.load(tmp_path / "bert")
    bart = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    BartModel(bart).save_pretrained(tmp_path / "bart")
    with pytest.raises(ModelError, match="bart is an encoder-decoder model"):
        causal.load(tmp_path / "bart")
    LlamaModel.from_pretrained(untied).save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match=r"lacks 1 weights .* lm_head\.weight"):
        causal.load(tmp_path / "headless")


def test_layers_that_depend_on_their_place_are_not_pruned(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=32, n_layer=4, n_head=2,
        scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="scaling of a layer depends on its place"):
        causal.build(tmp_path, student(start="pruned", layers=2), seed=0)


def test_vocabularies_are_compared_token_by_token(
    llama: Path, tmp_path: Path, tiny_encoder
) -> None:
    assert vocabulary.other_vocabulary(llama, llama) == ""
    swapped = make_tiny_llama(tmp_path / "swapped", layers=1, swap=True)
    assert "is 5 to the teacher and 6 to the student" in vocabulary.other_vocabulary(swapped, llama)
    assert vocabulary.other_vocabulary(tiny_encoder.path, llama)


def test_a_token_that_was_added_and_an_output_layer_too_small_are_seen(
    llama: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    assert vocabulary.other_vocabulary(llama, tmp_path) == (
        "'<new>' is 50 to the teacher and no token to the student"
    )
    causal.load(llama).save_pretrained(tmp_path)  # whose output layer does not know it
    assert vocabulary.other_vocabulary(tmp_path, tmp_path) == (
        "'<new>' is 50, and the student's model ends at 49"
    )
