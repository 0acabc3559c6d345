"""A student whose tokens are not the teacher's: learned as text, or by sorted probabilities."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from journeyman import recipe
from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset
from journeyman.labels.codec import Codec
from journeyman.mirror import Mirror
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.student import loop, step, token_rows
from journeyman.student.models import load_tokenizer
from journeyman.student.token_dataset import TokenDataset
from tests.conftest import ROOT

from ..labels import synthetic as made
from .conftest import make_causal_recipe
from .test_alignment import byte_pairs


def settings(
    kind: str = "generate", labels: dict[str, object] | None = None, **training: object
) -> Recipe:
    values = make_causal_recipe({"model": "test/tiny-bytes", "max_length": 96}).model_dump(
        mode="json"
    )
    values["training"] |= training
    asked: dict[str, object] = {"kind": kind} | ({} if kind == "rationales" else {"k": 3})
    asked |= {} if kind == "logits" else {"prompt": "{{ text }}"}
    return recipe.parse(values | {"labels": asked | (labels or {})})


def sentences(n: int) -> list[tuple[str, str]]:
    """Beginnings and ends of Wikipedia's sentences."""
    with gzip.open(ROOT / "jobs" / "recipes" / "wikitext" / "sentences.txt.gz", "rt") as lines:
        texts = [line.split() for line, _ in zip(lines, range(n), strict=False)]
    return [(" ".join(words[:4]), " " + " ".join(words[4:14])) for words in texts]


def trained(
    run: Path, recipe_: Recipe, student: Model, teacher: Model
) -> tuple[loop.TrainResult, Path]:
    result = step.train(
        recipe_, run / "labels", run / "corpus", student, teacher, run / "student",
        inputs="inputs", labels_digest="labels", on_progress=lambda _: None,
    )  # fmt: skip
    return result, run / "student"


@pytest.mark.slow
def test_answers_are_learned_as_text_of_its_own(
    ray_cluster: None, tiny_llama: Model, bytes_llama: Model, tmp_path: Path
) -> None:
    asked = settings(epochs=12, batch_size=8, workers=1)
    shard = []
    for i, (prompt, said) in enumerate(sentences(40)):
        ids = np.arange(3, 9)
        answer = made.generated(said, ids, made.distributions(len(ids), i))
        shard.append((made.row(prompt, "train" if i < 32 else "calibrate"), answer))
    made.write_dataset(tmp_path, asked.labels, [shard], codec=made.TOP3)
    result, folder = trained(tmp_path, asked, bytes_llama, tiny_llama)
    first, best = result.evaluations[0], result.best
    assert best.perplexity < 0.7 * first.perplexity
    assert best.kl is None
    assert best.cross_entropy == pytest.approx(np.log(best.perplexity), rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == load_tokenizer(bytes_llama.path).get_vocab()
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked_of = tokenizer("the history of the", return_tensors="pt")
    written = model.generate(**asked_of, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("the history of the")


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i - 3}" for i in ids)


@pytest.mark.parametrize(("kind", "context"), [("generate", ""), ("logits", ""), ("logits", "is")])
def test_a_distribution_stands_where_the_teachers_token_begins(
    kind: str, context: str, tiny_llama: Model, bytes_llama: Model, tmp_path: Path
) -> None:
    asked = settings(kind, {"context": f"{context} "} if context else {})
    ids = {"train": [5, 20, 11, 44], "calibrate": [30, 7]}
    dense = {s: made.distributions(len(t), seed=len(t)) for s, t in ids.items()}
    shard = []
    for split, said in ids.items():
        if kind == "generate":
            answer = made.generated(words(said), said, dense[split])
            shard.append((made.row("the", split), answer))
        else:
            recorded = dense[split][0 if context else 1 :]
            shard.append((made.row(words(said), split), made.logits(said, recorded)))
    made.write_dataset(tmp_path, asked.labels, [shard], codec=made.TOP3)
    student, teacher = load_tokenizer(bytes_llama.path), load_tokenizer(tiny_llama.path)
    counts = token_rows.build(
        tmp_path / "labels", tmp_path / "corpus", asked.labels, student, 96, tmp_path / "rows",
        as_text=False, teacher=teacher,
    )  # fmt: skip
    n_first = 0 if kind == "generate" or context else 1
    assert counts["aligned"] == 4 + 2 - 2 * n_first
    rows = TokenDataset(tmp_path / "rows" / "train")
    batch = rows.batch(np.array([0]))
    assert rows.other_tokens and batch.token_ids is not None and batch.log_tail_mass is not None
    whole = list(batch.rows.ids)
    at = len(whole) - len(batch.targets)  # of the first learned token
    begins = [student.decode(whole[:i]) for i in range(at, len(whole))]
    before = "the" if kind == "generate" else f"{context} " if context else ""
    expected = made.top(dense["train"])
    found = {}
    for i, begin in enumerate(begins):
        read = begin.removeprefix(before).split()
        if batch.token_ids[i, 0] >= 0:
            found[len(read)] = batch.token_ids[i].tolist()
        else:
            assert batch.log_tail_mass[i] == 0 and (batch.logprobs[i] == -np.inf).all()
    wanted = range(n_first, len(ids["train"]))
    assert found == {j: expected.token_ids[j].tolist() for j in wanted}


@pytest.mark.slow  # half a minute, to learn
def test_sorted_probabilities_teach_another_vocabulary(
    ray_cluster: None, tiny_llama: Model, bytes_llama: Model, tmp_path: Path
) -> None:
    asked = settings(
        epochs=8, batch_size=8, workers=2, divergence="uld", cross_entropy=0.5, learning_rate=2e-2
    )
    random, shard = np.random.default_rng(0), []
    for i in range(40):
        said = random.integers(3, 48, size=4).tolist()
        sure = np.full((4, made.VOCABULARY), 0.02 / (made.VOCABULARY - 1))
        sure[np.arange(4), said] = 0.98
        prompt = f"the {words(said)} is"
        answer = made.generated(words(said), said, sure)
        shard.append((made.row(prompt, "train" if i < 32 else "calibrate"), answer))
    made.write_dataset(tmp_path, asked.labels, [shard], codec=made.TOP3)
    result, _ = trained(tmp_path, asked, bytes_llama, tiny_llama)
    first, best = result.evaluations[0], result.best
    assert best.perplexity < first.perplexity
    assert best.cross_entropy == pytest.approx(np.log(best.perplexity), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "training", "why"),
    [
        ("logits", {}, "another vocabulary than the teacher.* learned as text then"),
        ("generate", {"divergence": "reverse_kl"}, "reverse_kl compares distributions token by"),
        ("generate", {"tail": "renormalised"}, "as text, .* training.tail would change nothing"),
    ],
)
def test_token_by_token_is_refused_with_the_reason(
    kind: str, training: dict[str, object], why: str, tiny_llama: Model, bytes_llama: Model
) -> None:
    with pytest.raises(RecipeError, match=why):
        step.check_vocabulary(settings(kind, **training), bytes_llama, tiny_llama)
    step.check_vocabulary(settings(kind, **training), tiny_llama, tiny_llama)
    uld = settings(kind, divergence="uld", cross_entropy=0.3)
    step.check_vocabulary(uld, bytes_llama, tiny_llama)


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("generate", {}),
        ("generate", {"divergence": "uld", "cross_entropy": 0.3}),
        ("rationales", {}),
    ],
)
def test_chats_with_a_student_that_has_no_template_are_refused_before_labels_are_paid_for(
    kind: str, training: dict[str, object], tiny_llama: Model, bytes_llama: Model, tmp_path: Path
) -> None:  # fmt: skip
    plain, chat = settings(kind, **training), settings(kind, {"chat": True}, **training)
    step.check_vocabulary(plain, bytes_llama, tiny_llama)
    with pytest.raises(RecipeError, match=r"student\.model: test/tiny-bytes has no chat template"):
        step.check_vocabulary(chat, bytes_llama, tiny_llama)
    tokenizer = load_tokenizer(bytes_llama.path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    shutil.copytree(bytes_llama.path, tmp_path / "instruct")
    tokenizer.save_pretrained(tmp_path / "instruct")
    instruct = dataclasses.replace(bytes_llama, path=tmp_path / "instruct")
    step.check_vocabulary(chat, instruct, tiny_llama)


def test_a_student_of_the_teachers_tokens_needs_no_template_of_its_own(tiny_llama: Model) -> None:
    chat = settings(labels={"chat": True})
    step.check_vocabulary(chat, tiny_llama, tiny_llama)


def test_a_student_that_was_trained_before_a_setting_was_refused_is_exported(
    tiny_llama: Model, bytes_llama: Model, tmp_path: Path
) -> None:
    asked = settings(temperature=2.0)
    with pytest.raises(RecipeError, match="would change nothing; leave it out"):
        step.check_vocabulary(asked, bytes_llama, tiny_llama)
    said = made.generated(" a city", np.arange(3, 6), made.distributions(3, 0))
    shard = [(made.row("Paris is", split), said) for split in ("train", "calibrate")]
    made.write_dataset(tmp_path, asked.labels, [shard], codec=made.TOP3)
    given = (asked, tmp_path / "labels", tmp_path / "corpus", bytes_llama, tiny_llama)
    step.write_rows(*given, tmp_path / "rows", ("calibrate",))
    assert TokenDataset(tmp_path / "rows" / "calibrate").against == "text"
    with pytest.raises(RecipeError, match="would change nothing"):
        step._causal(*given, Mirror(local=tmp_path / "rows"), dataset.made)
    step.write_rows(*given, tmp_path / "rows")
    step._causal(*given, Mirror(local=tmp_path / "rows"), dataset.made)


def test_a_tokenizer_that_changes_the_text_is_a_sentence(tmp_path: Path) -> None:
    asked, teacher = settings(), byte_pairs(300)
    codec = Codec(name="topk_fp16", vocab_size=300, k=3)
    shard = []
    for split in ("train", "calibrate"):
        ids = teacher.encode("THE QUICK")
        said = made.generated("THE QUICK", ids, made.distributions(len(ids)))
        shard.append((made.row("the", split), said))
    made.write_dataset(tmp_path, asked.labels, [shard], codec=codec)
    for _ in range(2):  # nothing is left that a second run would take for rows
        with pytest.raises(DataError, match="no token of the student begins"):
            token_rows.build(
                tmp_path / "labels", tmp_path / "corpus", asked.labels,
                byte_pairs(300, lower=True), 96, tmp_path / "rows", as_text=False, teacher=teacher,
            )  # fmt: skip
        assert not (tmp_path / "rows" / "calibrate").exists()


@pytest.mark.parametrize(
    ("training", "labels", "why"),
    [
        ({"cross_entropy": 0.0}, {}, "give cross_entropy a share between 0 and 1, got 0"),
        ({"temperature": 2.0}, {}, "goes with temperature: 1 and tail: bucket"),
        ({}, {"codec": "sampled"}, "take labels.codec: topk_fp16"),
        ({"divergence": "jsd"}, {"codec": "sampled"}, "estimates forward_kl at temperature 1"),
        (
            {"divergence": "forward_kl", "temperature": 2.0},
            {"codec": "sampled"},
            "estimates forward_kl at temperature 1",
        ),
    ],
)
def test_what_the_record_cannot_give_is_refused(
    training: dict[str, object], labels: dict[str, object], why: str
) -> None:
    with pytest.raises(RecipeError, match=why):
        settings("logits", labels, **{"divergence": "uld", "cross_entropy": 0.5} | training)
