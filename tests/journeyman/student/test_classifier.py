"""Classifiers as students: pruned from a language model or an encoder, fresh, and with low-rank
matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from journeyman.errors import ModelError
from journeyman.recipe import Student, parse
from journeyman.student import batches, classifier, export, loop, lora, models, pruning
from journeyman.student.checkpoints import Checkpoints, Evaluation, State
from journeyman.student.classifying import Classifying

from .conftest import FILLERS, TOPICS, make_recipe, make_rows, reader, resolved

LABELS = tuple(TOPICS)
WORDS = [*FILLERS, *(word for topic in TOPICS.values() for word in topic)]
SIZES = {"vocab_size": len(WORDS) + 2, "hidden_size": 32, "num_attention_heads": 2}
ROWS = make_rows(n_train=300, n_calibrate=40)
IDS = torch.tensor([[3, 7, 11, 2, 9]])


def student(**settings: object) -> Student:
    return Student.model_validate({"model": "test/tiny", "max_length": 16, **settings})


def make_teacher(folder: Path, layers: int = 5) -> Path:
    """A random Llama that knows the words of ``make_rows``, and has no token to pad with."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, intermediate_size=64, num_hidden_layers=layers, num_key_value_heads=1,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "llama")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("parents")
    torch.manual_seed(0)
    encoder = {**SIZES, "num_hidden_layers": 4, "intermediate_size": 64, "pad_token_id": 0}
    BertModel(BertConfig(**encoder)).save_pretrained(folder / "bert")
    RobertaModel(RobertaConfig(**encoder)).save_pretrained(folder / "roberta")
    DistilBertModel(
        DistilBertConfig(vocab_size=50, dim=32, n_layers=4, n_heads=2, hidden_dim=64)
    ).save_pretrained(folder / "distilbert")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=4, n_head=2)
    ).save_pretrained(folder / "gpt2")
    return lambda kind: teacher if kind == "llama" else folder / kind


def build(folder: Path, settings: Student) -> torch.nn.Module:
    return classifier.build(folder, settings, LABELS, pad_id=0, seed=0)


# --- where they start ---


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert"])
def test_a_pruned_classifier_is_a_plain_one_of_the_layers_that_were_kept(
    kind: str, parents: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = AutoModel.from_pretrained(parents(kind))
    pruned = build(parents(kind), student(start="pruned", layers=3)).eval()
    pruned.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_hidden_layers == 3
    assert tuple(plain.config.id2label.values()) == LABELS and plain.config.pad_token_id == 0
    there, kept = (_layers(model) for model in (whole, plain.base_model))
    for number, layer in zip([0, round((len(there) - 1) / 2), len(there) - 1], kept, strict=True):
        for name, value in layer.named_parameters():
            assert value.equal(there[number].get_parameter(name))
    assert plain.get_input_embeddings().weight.equal(whole.get_input_embeddings().weight)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, pruned(IDS).logits)
    again = build(parents(kind), student(start="pruned", layers=3)).eval()
    with torch.no_grad():
        assert again(IDS).logits.equal(pruned(IDS).logits)  # its head has the seed's weights


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def test_its_head_reads_what_the_teachers_layers_make_of_the_last_token(teacher: Path) -> None:
    pruned = build(teacher, student(start="pruned", layers=2)).eval()
    whole = AutoModelForCausalLM.from_pretrained(teacher).eval()
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in (0, 4))
    with torch.no_grad():
        last = whole.model(IDS, use_cache=False).last_hidden_state[:, -1]
        padded = torch.cat([IDS, torch.zeros_like(IDS)], dim=1)
        answered = pruned(padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(answered, last @ pruned.score.weight.T)


@pytest.mark.parametrize("kind", ["llama", "bert", "distilbert"])
def test_a_fresh_classifier_has_its_own_weights_and_the_changed_config(
    kind: str, parents: Callable[[str], Path]
) -> None:
    settings = student(start="fresh", layers=2, config={"hidden_size": 64})
    one, same = (build(parents(kind), settings) for _ in range(2))
    assert one.config.num_hidden_layers == 2 and one.config.hidden_size == 64
    assert tuple(one.config.id2label.values()) == LABELS and one.config.pad_token_id == 0
    assert all(a.equal(b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert one.get_input_embeddings().weight.shape[1] == 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": "pruned", "layers": 9}, r"student.layers is 9, and it has 5 layers"),
        ({"start": "fresh", "config": {"hiden_size": 8}}, r"did you mean hidden_size\?"),
        ({"start": "fresh", "config": {"vocab_size": 20}}, "its tokenizer knows 27"),
        ({"start": "fresh", "config": {"hidden_size": "wide"}}, "student.config"),
        ({"lora": {"target_modules": ["nothing"]}}, r"check student\.lora\.target_modules"),
        ({"lora": {"target_modules": ["score"]}}, r"check student\.lora\.target_modules"),
    ],
)
def test_a_start_that_cannot_be_gets_a_sentence(
    teacher: Path, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        build(teacher, student(**settings))


def test_sizes_that_do_not_go_together_are_told_before_the_first_step(tmp_path: Path) -> None:
    """DeBERTa's pooler keeps the size that its config names apart."""
    make_teacher(tmp_path)
    sizes = SIZES | {"intermediate_size": 64, "num_hidden_layers": 2, "pooler_hidden_size": 32}
    DebertaV2Config(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"with student\.config {'hidden_size': 64}"):
        build(tmp_path, student(start="fresh", config={"hidden_size": 64}))


def make_seeing(folder: Path) -> None:
    """A model of texts and images, as Gemma 3 is from four billion on."""
    make_teacher(folder)
    text = SIZES | {"intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 1,
                    "head_dim": 16}  # fmt: skip
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize("start", ["pretrained", "fresh"])
def test_a_model_whose_language_is_a_part_of_it_classifies(start: str, tmp_path: Path) -> None:
    """Its padding is the language's, not the whole's; and no text reaches all of its weights."""
    make_seeing(tmp_path)
    model = build(tmp_path, student(start=start)).eval()
    texts = torch.tensor([[3, 7, 11], [5, 4, 0]])
    both = model(input_ids=texts, attention_mask=(texts > 0).long()).logits
    alone = model(input_ids=texts[1:, :2]).logits
    assert both.shape == (2, len(LABELS))
    torch.testing.assert_close(both[1:], alone)
    both.sum().backward()
    idle = [p for p in model.parameters() if p.grad is None]
    assert bool(idle) == models.has_parts_beside_text(model)


def test_a_pair_of_texts_needs_something_between_them(teacher: Path) -> None:
    with pytest.raises(ModelError, match=r"text_pair: .* puts nothing between two texts; write"):
        learner(None, teacher, text_pair="{{ text }}")


def test_a_text_without_a_token_is_one_that_ends(teacher: Path) -> None:
    """A decoder puts nothing around a text."""
    tokenizer = models.load_tokenizer(teacher, 8)
    rows = batches.tokenise(tokenizer, ["", "the", ""], 8)
    ids, mask = rows.padded(np.arange(3), 1)
    assert mask.sum(1).tolist() == [1, 1, 1] and ids[[0, 2], 0].tolist() == [0, 0]


# --- low-rank matrices ---


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert", "roberta"])
def test_low_rank_matrices_and_the_head_learn_alone_and_merge_into_a_plain_model(
    kind: str, parents: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    model = build(parents(kind), student(start="pruned", layers=2, lora={"rank": 2, "alpha": 4}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder, head = models.parameter_groups(lora.plain(model), encoder_rate=0.1, head_rate=0.2)
    assert {2} == {min(p.shape) for p in encoder["params"]}
    new = models.build(parents(kind), LABELS, seed=0)
    _, whole = models.parameter_groups(new, encoder_rate=0.1, head_rate=0.2)
    assert sorted(p.shape for p in head["params"]) == sorted(p.shape for p in whole["params"])
    for _ in range(2):  # the second matrix of each pair begins with zeros
        model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
        torch.optim.SGD([encoder, head]).step()
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    names = {id(p): name for name, p in model.named_parameters()}
    assert moved > {names[id(p)] for p in head["params"]}
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    lora.merged(copy.deepcopy(model)).save_pretrained(tmp_path)
    plain, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


# --- in training ---


def learner(folder: Path | None, parent: Path, **settings: object) -> Classifying:
    recipe = make_recipe(activation_checkpointing=True, learning_rate=1e-2)
    return Classifying(
        folder, torch.device("cpu"), model_dir=parent, student=student(**settings),
        training=recipe.training, read_rows=reader(ROWS, parent, recipe),
    )  # fmt: skip


def steps(of: Classifying, n: int) -> list[float]:
    """Losses before each step of plain gradient descent, the same rows again and again."""
    losses = []
    of.module.eval()
    for _ in range(n):
        loss, _ = of.loss(of.module, np.arange(24))
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in of.module.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
                    parameter.grad = None
    return losses


PRUNED = {"start": "pruned", "layers": 2}
LORA = {"lora": {"rank": 4}}
EMBEDDED = {"lora": {"rank": 4, "target_modules": ["embed_tokens", "q_proj"]}}


@pytest.mark.filterwarnings("error:.*(remote file|config file)")  # that the hub was asked for
@pytest.mark.parametrize(
    "settings",
    [PRUNED, {"start": "fresh", "layers": 2}, LORA, PRUNED | LORA, EMBEDDED],
    ids=["pruned", "fresh", "lora", "both", "embeddings"],
)
def test_it_goes_on_from_its_checkpoint_to_the_bit(
    settings: dict[str, object], teacher: Path, tmp_path: Path
) -> None:
    if "lora" in settings:
        pytest.importorskip("peft")
    first = learner(None, teacher, **settings)
    steps(first, 2)
    first.write(models.copy_on_cpu(first.module), tmp_path / "saved")
    again = learner(tmp_path / "saved", teacher, **settings)
    after = steps(first, 2)
    assert steps(again, 2) == after and after[1] < after[0]
    if "lora" in settings:
        learning = sum(p.nbytes for p in first.module.parameters() if p.requires_grad)
        written = [f for f in (tmp_path / "saved").iterdir() if f.name != "layers.json"]
        assert [f.name for f in written] == ["lora.pt"]
        assert written[0].stat().st_size < learning + 40_000  # names, beside them


def test_layers_are_measured_on_train_rows_and_stay_with_the_matrices(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a measurement would choose by now."""
    pytest.importorskip("peft")
    settings = PRUNED | LORA | {"layer_choice": "similarity"}
    seen: list[str] = []
    measured = pruning.block_influence

    def influence(model: object, folder: Path, texts: list[str], max_length: int) -> np.ndarray:
        seen.extend(texts)
        return measured(model, folder, texts, max_length)

    monkeypatch.setattr(pruning, "block_influence", influence)
    learner(None, teacher, **settings)
    assert seen == ROWS.split("train").texts[:64]
    monkeypatch.setattr(pruning, "block_influence", lambda *_: np.array([0, 1, 0, 1, 0]))
    first = learner(None, teacher, **settings)
    first.write(models.copy_on_cpu(first.module), tmp_path / "saved")
    monkeypatch.setattr(pruning, "block_influence", lambda *_: np.array([1, 0, 0, 0, 1]))
    learner(tmp_path / "saved", teacher, **settings).export(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    whole = AutoModelForCausalLM.from_pretrained(teacher)
    for layer, number in zip(plain.model.layers, (1, 3), strict=True):
        expected = whole.model.layers[number].mlp.up_proj.weight
        torch.testing.assert_close(layer.mlp.up_proj.weight, expected)


@pytest.mark.parametrize("settings", [PRUNED, PRUNED | LORA], ids=["pruned", "lora"])
def test_it_learns_and_its_exported_folder_answers_by_transformers_alone(
    settings: dict[str, object], teacher: Path, tmp_path: Path
) -> None:
    if "lora" in settings:
        pytest.importorskip("peft")
    ours = learner(None, teacher, **settings)
    optimizer = torch.optim.AdamW(ours.groups(ours._training))
    for step in range(100):  # at this rate more make it forget again
        loss, _ = ours.loss(ours.module.train(), np.arange(300)[step % 10 :: 10])
        (loss / 30).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = ours.evaluate()
    assert measured.agreement > 0.9
    ours.module.eval()
    rows = ROWS.split("calibrate")
    logits = models.logits_of(ours.module, ours._held_out_tokens, pad_id=0, batch_size=7)
    work = Checkpoints.claim(tmp_path / "work")
    found = Evaluation(epoch=1, step=100, agreement=measured.agreement, kl=measured.kl, n_rows=40)
    state = State(step=100, total_steps=100, seconds=1.0, n_rows=300, evaluations=(found,))
    work.save(state, lambda folder: ours.write(ours.module, folder / "model"), n_bytes=1)

    def load(folder: Path | None, _: torch.device) -> Classifying:
        return learner(folder, teacher, **settings)

    with loop._plain(work.model(100), load, tmp_path) as plain:
        np.testing.assert_allclose(models.Classifier.load(plain).logits(rows.texts), logits,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
        theirs = AutoModelForSequenceClassification.from_pretrained(plain).eval()
        tokens = AutoTokenizer.from_pretrained(plain)(rows.texts, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(**tokens).logits, logits, rtol=1e-4, atol=1e-5)


# --- what is said of them ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PRUNED, "`test/teacher` (SHA-256 `w`),\n  2 of its layers (evenly spaced)."),
        (
            PRUNED | LORA | {"layer_choice": "similarity"},
            "(those that change hidden states most).\n- LoRA: low-rank matrices (rank 4, alpha 32) "
            "learned in place of the\n  weights, beside a head that learned whole, and were merged",
        ),
        (
            {"start": "fresh", "layers": 2, "config": {"hidden_size": 64}},
            "random ones, with the config of\n  `test/teacher` (SHA-256 `w`) and "
            "num_hidden_layers: 2, hidden_size: 64.",
        ),
        ({}, "- Weights it started from: `test/teacher` (SHA-256 `w`).\n"),
    ],
)
def test_the_card_says_where_it_started(
    settings: dict[str, object], words: str, teacher: Path, tmp_path: Path
) -> None:
    recipe = make_recipe()
    recipe = parse(recipe.model_dump(mode="json") | {"student": {"model": "m", **settings}})
    best = Evaluation(epoch=1, step=1, agreement=1.0, kl=0.1, n_rows=2)
    state = State(step=1, total_steps=1, seconds=1.0, n_rows=8, evaluations=(best,))
    (tmp_path / "curve").touch()
    (tmp_path / "model").mkdir()
    parent = replace(resolved(teacher, "test/teacher"), weights_digest="w")
    origin = export.Provenance(
        recipe=recipe, parent=parent, inputs="i", labels_digest="l", world_size=1, hardware={}
    )
    export.write(tmp_path / "out", tmp_path / "model", tmp_path / "curve", best, state, origin)
    card = (tmp_path / "out" / "README.md").read_text()
    assert words in card
    assert ("holds weights derived from `test/teacher`" in card) == ("random" not in words)
    assert ("base_model: test/teacher" in card) == ("random" not in words)
