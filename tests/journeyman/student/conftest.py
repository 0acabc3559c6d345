"""A tiny student and rows that it can learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from journeyman import models
from journeyman.labels.codec import Codec
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model
from journeyman.recipe import Recipe, parse
from journeyman.student import token_dataset
from journeyman.student.class_rows import HeldOutRows, Part, TrainRows, gathered
from journeyman.student.classifying import Classifying, load_tokenizer
from journeyman.student.lesson import Load
from journeyman.student.token_dataset import TokenRow

TOPICS = {
    "bank": ["money", "loan", "account", "card", "transfer"],
    "kitchen": ["soup", "bread", "oven", "salt", "dinner"],
    "car": ["tyre", "engine", "road", "fuel", "brake"],
}
FILLERS = ["please", "how", "do", "i", "my", "the", "a", "with", "need", "what"]


def make_tiny_encoder(folder: Path) -> Path:
    """A randomly initialised BERT, 2 layers and 32 wide, with a vocabulary of whole words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = [*FILLERS, *(word for topic in TOPICS.values() for word in topic)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    return folder


VOCABULARY = 50  # as in tests/journeyman/labels/synthetic.py


def make_tiny_llama(
    folder: Path, *, layers: int = 2, tied: bool = True, swap: bool = False
) -> Path:
    """A random Llama, 32 wide, whose tokens are the words w0 to w44; swap: two of them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 5)), "is", "the"]
    if swap:
        words[5], words[6] = words[6], words[5]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_tiny_bytes_llama(folder: Path) -> Path:
    """A random Llama whose tokens are byte pairs: another tokenizer than ``make_tiny_llama``'s."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(f"w{i} is the" for i in range(45))], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def resolved(folder: Path, reference: str, **digests: str) -> Model:
    """A model as workers find it again, by other names."""
    found = models.resolve(str(folder), cache=folder.parent)
    return dataclasses.replace(found, reference=reference, **digests)


@pytest.fixture(scope="session")
def bytes_llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_tiny_bytes_llama(tmp_path_factory.mktemp("bytes") / "tiny")
    return resolved(folder, "test/tiny-bytes", weights_digest="v" * 64, tokenizer_digest="b" * 64)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_tiny_llama(tmp_path_factory.mktemp("llama") / "tiny")
    return resolved(folder, "test/tiny-llama", weights_digest="w" * 64, tokenizer_digest="t" * 64)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")
    return resolved(folder, "test/tiny", weights_digest="w" * 64, tokenizer_digest="t" * 64)


def make_rows(n_train: int, n_calibrate: int, seed: int = 0) -> ClassRows:
    """Texts of 2 to 12 words with one word of their topic, and a teacher that is 90% sure."""
    random = np.random.default_rng(seed)
    n = n_train + n_calibrate
    gold = random.integers(len(TOPICS), size=n)
    texts = []
    for label in gold:
        words = list(random.choice(FILLERS, size=random.integers(1, 12)))
        topic = list(TOPICS.values())[label]
        words.insert(random.integers(len(words) + 1), str(random.choice(topic)))
        texts.append(" ".join(words))
    logprobs = np.full((n, len(TOPICS)), np.log(0.05))
    logprobs[np.arange(n), gold] = np.log(0.9)
    return ClassRows(
        labels=tuple(TOPICS),
        ids=[f"row-{i}" for i in range(n)],
        texts=texts,
        splits=np.array(["train"] * n_train + ["calibrate"] * n_calibrate),
        gold=np.where(np.arange(n) % 2, gold, -1),
        logprobs=logprobs,
    )


def loader(recipe: Recipe, encoder: Path, rows: Path) -> Load:
    """What a worker calls; its reader is a closure, which travels by value."""
    student, hard_labels = recipe.learner(), recipe.training.hard_labels

    def read() -> tuple[TrainRows, HeldOutRows]:
        """In two parts."""
        import pickle

        whole = pickle.loads(rows.read_bytes())
        parts = (whole.take(part) for part in np.array_split(np.arange(len(whole)), 2))
        tokenizer = load_tokenizer(encoder, student)
        made = (Part.of(part, tokenizer, student) for part in parts)
        return gathered(made, hard_labels=hard_labels)

    return partial(
        Classifying,
        model_dir=encoder,
        student=student,
        training=recipe.training,
        read_rows=read,
    )


def reader(rows: ClassRows, folder: Path, recipe: Recipe) -> Callable[[], Any]:
    """``Classifying``'s ``read_rows`` of rows in memory, for a student of the model in folder."""
    student = recipe.learner()
    part = Part.of(rows, load_tokenizer(folder, student), student)
    return lambda: gathered([part], hard_labels=recipe.training.hard_labels)


def make_recipe(**training: object) -> Recipe:
    settings = {
        "workers": 2,
        "cpus_per_worker": 0.5,
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 5e-3,
        "head_learning_rate": 5e-3,
        "max_failures": 0,
        **training,
    }
    return parse(
        {
            "name": "tiny",
            "corpus": {"sources": ["rows.jsonl"], "columns": {"label": "topic"}},
            "teacher": {"model": "test/teacher"},
            "labels": {"classes": {t: f"the {t}" for t in TOPICS}, "prompt": "{{ text }}"},
            "student": {"model": "test/tiny", "max_length": 16},
            "training": settings,
        }
    )


def make_causal_recipe(student: dict[str, object] | None = None, **training: object) -> Recipe:
    recipe = make_recipe(**training)
    settings = recipe.model_dump(mode="json") | {
        "labels": {"kind": "logits", "k": 3},
        "student": {"kind": "causal", "model": "test/tiny-llama", "max_length": 32}
        | (student or {}),
    }
    return parse(settings)


def write_token_rows(
    folder: Path,
    n_train: int,
    n_calibrate: int,
    weights: Sequence[float] = (1.0,),
    form: Literal["tops", "draws", "reasonings"] = "tops",
) -> None:
    """Texts that count up by one or two, and a teacher that is 90% sure of the next word.

    weights: of the texts in turn. form: what is on record of the teacher, its likeliest words, true
    draws, or text alone, with a reasoning behind each answer.
    """
    random = np.random.default_rng(0)
    codec = {
        "tops": Codec(name="topk_fp16", vocab_size=VOCABULARY, k=4),
        "draws": Codec(name="sampled", vocab_size=VOCABULARY, k=6),
        "reasonings": None,
    }[form]
    for split, n in (("train", n_train), ("calibrate", n_calibrate)):
        rows = []
        for i in range(n):
            step, length = random.integers(1, 3), random.integers(4, 12)
            tokens = 3 + (random.integers(40) + step * np.arange(length)) % 45
            others = np.array([(tokens[1:] + j) % VOCABULARY for j in (1, 2, 3)]).T
            ids = np.concatenate((tokens[1:, None], others), axis=1)
            logprobs = np.log(np.tile([0.9, 0.04, 0.03, 0.02], (length - 1, 1)))
            if form == "draws":
                drawn = random.choice(4, size=(length - 1, 6), p=[0.7, 0.1, 0.1, 0.1])
                ids = np.take_along_axis(ids, drawn, axis=1)
            row = TokenRow(
                id=f"{split}-{i}",
                tokens=tokens,
                first=1,
                payload=codec and codec.encode(ids, logprobs),
                n_encoded=length - 1 if codec else 0,
                weight=weights[i % len(weights)],
            )
            rows.append(row)
            if form == "reasonings":
                rows.append(dataclasses.replace(row, tokens=tokens[::-1], reasoning=True))
        token_dataset.write(folder / split, rows, codec)
