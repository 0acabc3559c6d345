"""The real engine against a float32 forward pass of the same model by transformers."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from journeyman import corpus, files
from journeyman.labels.replica import Counts, Replica, ReplicaSpec
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Classes
from journeyman.teacher.engine import EngineDied
from journeyman.teacher.tasks import ClassTask, ContextOverflow, EmptyTarget
from tests.conftest import children, small_recipe

TEXTS = [
    "how do i send money to my sister",
    "book me a table for two at eight",
    "my car's engine light is on<|im_end|>",
    "Überweisung: 20 € — bitte!",
]
POISON = "x " * 600  # longer than the recipe's max_model_len of 512 tokens


@pytest.fixture(scope="module")
def reports() -> list[Counts]:
    return []


@pytest.fixture(scope="module")
def replica(
    teacher_model: Model, tmp_path_factory: pytest.TempPathFactory, reports: list[Counts]
) -> Iterator[Replica]:
    """One labeling replica, with its engine, in this process."""
    directory = tmp_path_factory.mktemp("replica")
    spec = ReplicaSpec(
        recipe=small_recipe(directory, "labels.max_attempts=2"),
        model=teacher_model,
        corpus_dir=directory / "corpus",
        labels_dir=directory / "labels",
    )
    replica = Replica(spec, reports.append)
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def reference(teacher_model: Model):
    model = AutoModelForCausalLM.from_pretrained(teacher_model.path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(teacher_model.path)


def logprobs(model, ids: list[int]) -> torch.Tensor:
    """float64[n, vocabulary]: log-probabilities of the token behind each."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def task_of(replica: Replica, **changes: object) -> ClassTask:
    labels = Classes.model_validate(replica._spec.recipe.labels.model_dump() | changes)
    return ClassTask(labels, replica._engine.tokenizer, replica._engine.max_model_len)


def run(replica: Replica, task: ClassTask, text: str):
    return replica._call(task.run(replica._engine, {"text": text}))


@pytest.mark.parametrize("text", TEXTS)
def test_channel_scores_equal_a_float32_forward_pass(replica: Replica, reference, text: str):
    model, tokenizer = reference
    target = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    loglik = []
    for words in replica._spec.recipe.classes().classes.values():
        prompt = f"<|im_start|>system\nThe user asks about {words}.<|im_end|>\n<|im_start|>user\n"
        context = tokenizer.encode(prompt, add_special_tokens=False)
        table = logprobs(model, context + target)
        positions = range(len(context) - 1, len(context) + len(target) - 1)
        loglik.append(sum(table[p, t].item() for p, t in zip(positions, target, strict=True)))
    wanted = torch.tensor(loglik, dtype=torch.float64).log_softmax(0).numpy()
    got = run(replica, task_of(replica), text)
    np.testing.assert_allclose(got.class_logprobs, wanted, atol=2e-3)
    assert got.label_mass is None


@pytest.mark.parametrize("text", TEXTS)
def test_direct_scores_equal_a_full_softmax_restricted_to_the_label_words(
    replica: Replica, reference, text: str
):
    model, tokenizer = reference
    classes = {"money": " money", "food": " food", "cars": " cars"}
    task = task_of(
        replica, scoring="direct", classes=classes, prompt="Request: {{ text }}\nIt is about"
    )
    word_ids = [tokenizer.encode(w, add_special_tokens=False)[0] for w in classes.values()]
    pieces = [("Request: ", {}), (text, {"split_special_tokens": True}), ("\nIt is about", {})]
    if "<|" in text:  # only then is the text encoded apart
        ids = [t for p, o in pieces for t in tokenizer.encode(p, add_special_tokens=False, **o)]
    else:
        ids = tokenizer.encode("".join(p for p, _ in pieces), add_special_tokens=False)
    full = logprobs(model, ids)[-1][word_ids]
    got = run(replica, task, text)
    np.testing.assert_allclose(got.class_logprobs, full.log_softmax(0).numpy(), atol=2e-3)
    assert got.label_mass == pytest.approx(full.exp().sum().item(), rel=2e-3)


def test_rows_that_cannot_be_scored_say_why(replica: Replica):
    with pytest.raises(ContextOverflow, match="the teacher takes 511"):
        run(replica, task_of(replica), POISON)
    with pytest.raises(EmptyTarget, match="nothing to score"):
        run(replica, task_of(replica, target="{% if false %}x{% endif %}"), "hello")


def write_shard(replica: Replica, name: str, texts: list[str]) -> None:
    rows = [
        {"id": f"{i:032x}", "text": t, "label": None, "split": "train", "meta": None, "count": 1}
        for i, t in enumerate(texts)
    ]
    path = replica._spec.corpus_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=corpus.schema()), path)


def test_every_row_of_a_shard_is_labeled_or_quarantined_with_its_reason(replica: Replica):
    write_shard(replica, "part-00000.parquet", [TEXTS[0], POISON, TEXTS[1]])
    commit = replica.label("part-00000.parquet")
    assert (commit.rows, commit.ok, commit.quarantined, commit.filtered) == (3, 2, 1, 0)
    store = LabelStore(replica._spec.labels_dir)
    assert store.read_shard(commit)["id"].to_pylist() == [f"{i:032x}" for i in (0, 2)]
    quarantined = pq.read_table(store.directory / commit.quarantine).to_pylist()
    assert [(q["id"], q["error_class"]) for q in quarantined] == [(f"{1:032x}", "ContextOverflow")]
    assert json.loads(quarantined[0]["input"])["text"] == POISON
    assert commit.sha256 == files.file_digest(store.directory / commit.data)


def test_an_engine_that_is_killed_is_replaced_and_no_row_is_lost(
    replica: Replica, reports: list[Counts]
):
    texts = [f"{text} number {i}" for i in range(30) for text in TEXTS]
    write_shard(replica, "part-00001.parquet", texts)
    done_before = sum(counts.rows for counts in reports)

    def kill_in_mid_shard() -> None:
        while sum(counts.rows for counts in reports) == done_before:
            time.sleep(0.02)
        for process in children("EngineCore"):
            os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_in_mid_shard)
    killer.start()
    commit = replica.label("part-00001.parquet")
    killer.join()
    assert commit.engine_restarts == 1
    assert (commit.ok, commit.quarantined) == (len(texts), 0)
    ids = LabelStore(replica._spec.labels_dir).read_shard(commit)["id"].to_pylist()
    assert ids == [f"{i:032x}" for i in range(len(texts))]


def test_a_row_that_kills_the_engine_each_time_is_found_and_the_others_are_kept(replica: Replica):
    """The engine is killed for real; only the choice of the row that does it is the test's."""
    guilty = "this one kills"
    write_shard(replica, "part-00002.parquet", [*TEXTS, guilty, "and one more"])
    task, run_row = replica._task, replica._task.run

    async def deadly(engine, row):
        if row["text"] == guilty:
            died = engine._died  # of this engine: by and by another takes its place
            for process in children("EngineCore"):
                os.kill(process.pid, signal.SIGKILL)
            await asyncio.wait({died})
            raise EngineDied
        return await run_row(engine, row)

    task.run = deadly
    try:
        commit = replica.label("part-00002.parquet")
    finally:
        task.run = run_row
    assert (commit.ok, commit.quarantined) == (5, 1)
    store = LabelStore(replica._spec.labels_dir)
    (row,) = pq.read_table(store.directory / Path(commit.quarantine)).to_pylist()
    assert (row["error_class"], json.loads(row["input"])["text"]) == ("EngineDied", guilty)
