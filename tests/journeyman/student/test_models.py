"""What a student's model is checked for before it trains, and that it answers as it did there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, GPT2Config, RobertaConfig, T5Config

from journeyman.errors import ModelError
from journeyman.models import Model
from journeyman.student import packed
from journeyman.student.classifying import Classifying
from journeyman.student.models import Classifier, check_positions

from .conftest import make_recipe, make_rows, reader

FOLDER = Path("student")


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (BertConfig(max_position_embeddings=512), 512),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (GPT2Config(n_positions=1024), 1024),
    ],
)
def test_inputs_longer_than_a_students_positions_are_refused(config: object, most: int):
    check_positions(config, most, FOLDER)
    with pytest.raises(ModelError, match=f"student reads {most} tokens at most, and {most + 1}"):
        check_positions(config, most + 1, FOLDER)


def test_a_model_without_positions_reads_any_length():
    check_positions(T5Config(), 100_000, FOLDER)


def exported(folder: Path, out: Path) -> Classifier:
    """A classifier before its first step, of this model, for inputs of 16 tokens."""
    recipe = make_recipe()
    student = Classifying(
        None, torch.device("cpu"), model_dir=folder, student=recipe.learner(),
        training=recipe.training, read_rows=reader(make_rows(4, 2), folder, recipe),
    )  # fmt: skip
    student.export(out)
    return Classifier.load(out)


def test_the_exported_tokenizer_file_cuts_as_trained_and_does_not_pad(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    """For those who read it alone, whatever the parent's says."""
    shutil.copytree(tiny_encoder.path, tmp_path / "before")
    path = tmp_path / "before" / "tokenizer.json"
    parents = Tokenizer.from_file(str(path))
    parents.enable_truncation(9)
    parents.enable_padding(length=9)
    parents.save(str(path))
    exported(tmp_path / "before", tmp_path / "student")
    found = Tokenizer.from_file(str(tmp_path / "student" / "tokenizer.json"))
    assert len(found.encode("please").ids) == 3  # [CLS] please [SEP]
    assert len(found.encode("please " * 30).ids) == make_recipe().learner().max_length == 16


def test_a_student_is_asked_with_as_many_tokens_as_it_was_trained_with(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    """Also where its tokenizer names fewer, as one does that was a student before."""
    shutil.copytree(tiny_encoder.path, tmp_path / "before")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder.path)
    tokenizer.model_max_length = 6
    tokenizer.save_pretrained(tmp_path / "before")
    student = exported(tmp_path / "before", tmp_path / "student")
    begun = "please how do i my the a"  # seven words
    ends = [f"{begun} money", f"{begun} soup", f"{begun} {'money ' * 8} soup"]
    first, second, cut = student.logits(ends)
    assert not np.allclose(first, second)
    whole = student.logits([f"{begun} {'money ' * 7}"])[0]
    np.testing.assert_allclose(cut, whole, atol=1e-7)


def test_a_decoder_without_a_padding_token_answers(tiny_llama: Model, tmp_path: Path) -> None:
    """As it does text by text."""
    shutil.copytree(tiny_llama.path, tmp_path / "decoder")
    for name in ("config.json", "tokenizer_config.json"):
        path = tmp_path / "decoder" / name
        values = json.loads(path.read_text())
        values.pop("pad_token_id" if name == "config.json" else "pad_token")
        path.write_text(json.dumps(values))
    assert AutoTokenizer.from_pretrained(tmp_path / "decoder").pad_token_id is None
    student = exported(tmp_path / "decoder", tmp_path / "student")
    texts = ["w1", "w2 w3 w4 w5", "w6 w7"]
    alone = np.concatenate([student.logits([text]) for text in texts])
    np.testing.assert_allclose(student.logits(texts), alone, atol=1e-5)


def test_packed_layers_compute_what_the_plain_ones_do() -> None:
    for n_in, n_out, bias in ((48, 64, True), (64, 7, False)):
        linear = torch.nn.Linear(n_in, n_out, bias=bias)
        x = torch.randn(3, 5, n_in)
        exact = x.double() @ linear.weight.double().T
        exact = exact + linear.bias.double() if bias else exact
        found = packed.PackedLinear(linear)(x)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_a_packed_student_answers_the_same_and_gives_its_memory_back(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    student = exported(tiny_encoder.path, tmp_path / "student")
    texts = ["pay my bill", "a flight to rome, and one back", "eggs"]
    before = student.logits(texts)
    student.pack()
    layers = [m for m in student.model.modules() if isinstance(m, packed.PackedLinear)]
    assert layers and not any(type(m) is torch.nn.Linear for m in student.model.modules())
    np.testing.assert_allclose(student.logits(texts), before, atol=1e-5)
    np.testing.assert_allclose(student.logits(texts[1:2]), before[1:2], atol=1e-5)
    student.unload()
    assert all(layer._packed is None for layer in layers)
    assert all(p.device.type == "meta" for p in student.model.parameters())
