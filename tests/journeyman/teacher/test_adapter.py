"""A teacher with a LoRA adapter on a real engine, against a float32 forward pass by peft."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from journeyman import models
from journeyman.errors import ModelError
from journeyman.labels.replica import Replica
from journeyman.models import Model
from journeyman.recipe import Generate, Logits, Teacher
from journeyman.teacher.engine import Engine
from tests.benchmarks import tiny_teacher
from tests.conftest import replica_of, small_recipe

from .test_engine import ATOL, TEXTS, classes, log_softmax, logprobs, plain, run, sequence_logprob

Reference = tuple[Any, Any]  # a model and its tokenizer


def make_adapter(folder: Path, model: Model, modules: list[str], rank: int = 6) -> Path:
    """One whose weights say something, saved by peft."""
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=modules)
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.03)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(teacher_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """64 wide, whose engine starts sooner."""
    folder = tiny_teacher.make(tmp_path_factory.mktemp("tiny") / "tiny", teacher_model)
    return models.resolve(str(folder))


@pytest.fixture(
    scope="module", params=["layers", pytest.param("output layer", marks=pytest.mark.slow)]
)
def base(request: pytest.FixtureRequest, teacher_model: Model, tiny: Model) -> Model:
    return teacher_model if request.param == "layers" else tiny


@pytest.fixture(scope="module")
def adapter(base: Model, tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM adds to the output layer apart from all others."""
    modules = ["q_proj", "lm_head"] if base is tiny else ["q_proj", "v_proj"]
    return make_adapter(tmp_path_factory.mktemp("adapter"), base, modules)


@pytest.fixture(scope="module")
def reference(base: Model, adapter: Path) -> Reference:
    bare = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(bare, adapter)
    return adapted.eval(), AutoTokenizer.from_pretrained(base.path)


@pytest.fixture(scope="module")
def replica(
    base: Model, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replica]:
    directory = tmp_path_factory.mktemp("adapted")
    settings = small_recipe(directory, f"teacher.model={base.path}", f"teacher.lora={adapter}")
    with replica_of(settings, models.teacher(settings.teacher), []) as replica:
        yield replica


def test_stored_logits_are_the_adapted_models(replica: Replica, reference: Reference) -> None:
    ids = plain(reference[1], " ".join(TEXTS))
    full = logprobs(reference, ids)[:-1]
    got = run(replica, Logits(k=16), " ".join(TEXTS)).recorded
    wanted = np.take_along_axis(full, got.token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(got.logprobs, wanted, atol=ATOL)
    with reference[0].disable_adapter():
        bare = logprobs(reference, ids)[:-1]
    assert np.abs(bare - full).max() > 0.5


def test_rows_labeled_together_are_each_their_own(replica: Replica, reference: Reference) -> None:
    async def together() -> list[Any]:
        from journeyman.teacher import tasks

        task = tasks.local(Logits(k=4), replica._backend)
        return await asyncio.gather(*(task.run({"text": text}, 0) for text in TEXTS * 3))

    for text, got in zip(TEXTS * 3, replica._call(together()), strict=True):
        full = logprobs(reference, plain(reference[1], text))[:-1]
        wanted = np.take_along_axis(full, got.recorded.token_ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(got.recorded.logprobs, wanted, atol=ATOL)


def test_channel_and_direct_classes_are_the_adapted_models(
    replica: Replica, reference: Reference
) -> None:
    tokenizer = reference[1]
    words = {"money": " money", "food": " food", "cars": " cars"}
    direct = classes(
        replica, scoring="direct", classes=words, prompt="Request: {{ text }}\nIt is about"
    )
    ids = tokenizer.encode(f"Request: {TEXTS[0]}\nIt is about", add_special_tokens=False)
    full = logprobs(reference, ids)[-1]
    wanted = [full[tokenizer.encode(w, add_special_tokens=False)[0]] for w in words.values()]
    got = run(replica, direct, TEXTS[0])
    np.testing.assert_allclose(got.class_logprobs, log_softmax(wanted), atol=ATOL)

    channel = classes(replica, classes=words, prompt="About{{ label }}:\n")
    target = plain(tokenizer, TEXTS[0])
    loglik = [
        sequence_logprob(reference, tokenizer.encode(f"About{w}:\n"), target)
        for w in words.values()
    ]
    got = run(replica, channel, TEXTS[0])
    np.testing.assert_allclose(got.class_logprobs, log_softmax(loglik), atol=ATOL)


def test_a_greedy_answer_is_the_adapted_models(replica: Replica, reference: Reference) -> None:
    model, tokenizer = reference
    prompt = tokenizer.encode("Once upon a time")
    with torch.inference_mode():
        wanted = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False
        )[0][len(prompt) :].tolist()
    got = run(replica, Generate(prompt="Once {{ text }}", max_tokens=12, k=4), "upon a time")
    assert got.token_ids.tolist() == wanted
    full = logprobs(reference, prompt + wanted)[len(prompt) - 1 : -1]
    stored = np.take_along_axis(full, got.recorded.token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(got.recorded.logprobs, stored, atol=ATOL)


# --- adapters that vLLM would add otherwise than they were trained, or not at all ---


@pytest.fixture(scope="module")
def plain_adapter(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("plain"), tiny, ["q_proj"])


@pytest.fixture
def copy(plain_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_adapter, tmp_path / "copy"))


def recipe_of(tiny: Model, copy: Path) -> Teacher:
    return small_recipe(copy, f"teacher.model={tiny.path}", f"teacher.lora={copy}").teacher


def refused(tiny: Model, copy: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        models.teacher(recipe_of(tiny, copy))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, r"DoRA; merge it"),
        ({"alpha_pattern": {"q_proj": 4}}, r"scales by module \(alpha_pattern\); merge it"),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, r"modules_to_save\) and biases"),
        ({"peft_type": "IA3"}, r"type IA3; teacher\.lora is for LoRA"),
    ],
)
def test_what_vllm_does_not_know_is_refused(
    tiny: Model, copy: Path, changes: dict, match: str
) -> None:
    config = copy / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    refused(tiny, copy, match)


def test_an_adapter_for_another_model_is_refused(tiny: Model, copy: Path) -> None:
    weights = load_file(copy / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.lora_A.weight"))
    weights[name] = weights[name][:, :8].contiguous()
    save_file(weights, copy / "adapter_model.safetensors")
    refused(tiny, copy, r"for a width of 8, and teacher\.model has 64 there")


def test_half_an_adapter_is_refused(tiny: Model, copy: Path) -> None:
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tiny, copy, r"cannot be read")
    weights.unlink()
    refused(tiny, copy, r"is no LoRA adapter")


@pytest.mark.slow  # half a minute for an engine that does not start
def test_what_only_vllm_finds_wrong_is_said_before_the_first_row(tiny: Model, copy: Path) -> None:
    weights = load_file(copy / "adapter_model.safetensors")
    named = {name.replace("q_proj", "queries"): w for name, w in weights.items()}
    save_file(named, copy / "adapter_model.safetensors")
    settings = recipe_of(tiny, copy)
    engine = Engine(settings, models.teacher(settings))

    async def start() -> None:
        try:
            await engine.start()
        finally:
            engine.close()

    with pytest.raises(ModelError, match=r"vLLM cannot add this adapter.*queries"):
        asyncio.run(start())
