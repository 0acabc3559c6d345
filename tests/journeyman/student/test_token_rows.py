"""Label datasets to batches of tokens, against what the test wrote and encodes itself."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from journeyman import recipe
from journeyman.errors import DataError
from journeyman.labels.codec import Codec
from journeyman.models import Model
from journeyman.student import models, step, token_dataset, token_rows
from journeyman.student.causal_learner import Causal
from journeyman.student.models import load_tokenizer
from journeyman.student.token_dataset import TokenDataset, TokenRow

from ..labels import synthetic as made
from .conftest import make_causal_recipe

WORDS = np.random.default_rng(0)


def tokens(n: int) -> list[int]:
    """Of the words w0 to w44."""
    return WORDS.integers(3, 48, size=n).tolist()


def text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i - 3}" for i in ids)


def built(
    run: Path, llama: Model, kind: str, rows: list[tuple[list[int], str]], length: int = 64,
    **labels: object,
) -> tuple[dict[str, TokenDataset], list[np.ndarray]]:  # fmt: skip
    """A dataset of (tokens, split), its rows as a training reads them, and each row's dense
    distributions."""
    settings = made.settings(kind, **labels)
    context = 2 if labels.get("context") else 0
    shard, dense = [], []
    for i, (ids, split) in enumerate(rows):
        source = made.row(text(ids), split)
        n_positions = len(ids) if context or kind == "generate" else len(ids) - 1
        probabilities = made.distributions(n_positions, seed=i)
        answer = made.generated(text(ids), ids, probabilities) if kind == "generate" else (
            made.logits(ids, probabilities))  # fmt: skip
        n_read = len(ids) + (1 if kind == "generate" else context)  # behind "the", or "is the"
        shard.append((source, dataclasses.replace(answer, n_prompt_tokens=n_read)))
        dense.append(probabilities)
    made.write_dataset(run, settings, [shard[::2], shard[1::2]], codec=made.TOP3)
    token_rows.build(
        run / "labels", run / "corpus", settings, load_tokenizer(llama.path), length,
        run / "rows", as_text=False,
    )  # fmt: skip
    return {s: TokenDataset(run / "rows" / s) for s in token_rows.SPLITS}, dense


def some_rows(n: int = 6) -> list[tuple[list[int], str]]:
    return [(tokens(4 + i), "calibrate" if i == n - 1 else "train") for i in range(n)]


@pytest.mark.parametrize("context", ["", "is the"])
def test_logits_stand_where_the_teacher_read_them(
    context: str, tiny_llama: Model, tmp_path: Path
) -> None:
    rows = some_rows()
    found, dense = built(tmp_path, tiny_llama, "logits", rows, context=context)
    before = [48, 49] if context else []
    train = found["train"]
    assert len(train) == 5 and len(found["calibrate"]) == 1
    for number, row_id in enumerate(train.ids):
        i = next(i for i, (ids, _) in enumerate(rows) if made.row(text(ids))["id"] == row_id)
        batch = train.batch(np.array([number]))
        whole = [*before, *rows[i][0]]
        first = max(1, len(before))
        assert batch.rows.ids.tolist() == whole
        assert batch.targets.tolist() == whole[first:]
        assert batch.columns.tolist() == list(range(first - 1, len(whole) - 1))
        expected = made.top(dense[i])
        assert batch.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(batch.logprobs, expected.logprobs, atol=2e-3)
        others = 1 - np.exp(expected.logprobs.astype(float)).sum(axis=1)
        np.testing.assert_allclose(np.exp(batch.log_tail_mass), others, atol=2e-3)


def test_a_batch_is_its_rows_one_behind_the_other(tiny_llama: Model, tmp_path: Path) -> None:
    train = built(tmp_path, tiny_llama, "generate", some_rows(), prompt="the {{ text }}")[0][
        "train"
    ]
    order = np.array([3, 0, 4])
    together, alone = train.batch(order), [train.batch(np.array([i])) for i in order]
    for name in ("targets", "columns", "token_ids", "logprobs", "log_tail_mass"):
        expected = np.concatenate([getattr(one, name) for one in alone])
        np.testing.assert_array_equal(getattr(together, name), expected)
    input_ids, mask, at = together.padded(0)
    for row, one in enumerate(alone):
        assert input_ids[row][mask[row] == 1].tolist() == one.rows.ids.tolist()
    # The hidden state at a place predicts the token behind it.
    np.testing.assert_array_equal(input_ids.flatten()[at + 1], together.targets)
    assert train.n_learned[order].sum() == len(together.targets)


def test_an_answer_stands_behind_its_prompt(tiny_llama: Model, tmp_path: Path) -> None:
    rows = some_rows()
    train = built(tmp_path, tiny_llama, "generate", rows, prompt="the {{ text }}")[0]["train"]
    batch = train.batch(np.array([0]))
    answer = batch.targets.tolist()
    assert batch.rows.ids.tolist() == [49, *answer, *answer]  # the prompt repeats the text


def test_long_rows_lose_context_first_and_then_their_end(tiny_llama: Model, tmp_path: Path) -> None:
    rows = [(tokens(6), "train"), (tokens(12), "train"), (tokens(5), "calibrate")]
    found, dense = built(tmp_path, tiny_llama, "logits", rows, length=7, context="is the")
    for i in range(2):
        whole = [49, *rows[i][0]][:7]
        number = found["train"].ids.index(made.row(text(rows[i][0]))["id"])
        batch = found["train"].batch(np.array([number]))
        assert batch.rows.ids.tolist() == whole and batch.targets.tolist() == whole[1:]
        kept = made.top(dense[i][: len(whole) - 1])
        assert batch.token_ids.tolist() == kept.token_ids.tolist()


def test_rationales_are_learned_as_answer_and_as_reasoning(
    tiny_llama: Model, tmp_path: Path
) -> None:
    settings = made.settings("rationales", prompt="the {{ text }}")
    sources = [made.row("w1 w2", "train"), made.row("w3", "calibrate")]
    shard = [(s, made.rationales(["w7", "w7", "w8"])) for s in sources]
    made.write_dataset(tmp_path, settings, [shard])
    tokenizer = load_tokenizer(tiny_llama.path)
    token_rows.build(tmp_path / "labels", tmp_path / "corpus", settings, tokenizer, 64,
                     tmp_path / "rows", as_text=True)  # fmt: skip
    train = TokenDataset(tmp_path / "rows" / "train")
    assert train.ids == [sources[0]["id"]] * 2
    answer, reasoning = (train.batch(np.array([i])) for i in range(2))
    assert tokenizer.decode(answer.targets) == "w7 <eos>" and answer.token_ids is None
    assert tokenizer.decode(answer.rows.ids).endswith("the w1 w2 w7 <eos>")
    assert "is w7" in tokenizer.decode(reasoning.targets)


def written(folder: Path, codec: Codec, n: int = 4) -> TokenDataset:
    rows = []
    for i in range(n):
        ids = np.array(tokens(5 + i))
        draws = np.random.default_rng(i).integers(made.VOCABULARY, size=(len(ids) - 1, codec.k))
        recorded = made.top(made.distributions(len(ids) - 1, i), k=codec.k)
        data = codec.encode(draws if codec.name == "sampled" else recorded.token_ids,
                            recorded.logprobs)  # fmt: skip
        rows.append(TokenRow(id=f"row-{i}", tokens=ids, first=1, payload=data,
                             n_encoded=len(ids) - 1))  # fmt: skip
    token_dataset.write(folder, rows, codec)
    return TokenDataset(folder)


def test_draws_have_as_many_entries_as_the_widest_row(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows", Codec(name="sampled", vocab_size=made.VOCABULARY, k=7))
    assert rows.sampled
    batch = rows.batch(np.arange(4))
    there = batch.token_ids >= 0
    np.testing.assert_allclose(np.exp(batch.logprobs).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(there, batch.logprobs > -np.inf)
    assert there.sum(axis=1).max() <= 7


def test_damage_is_named(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows", made.TOP3)
    payloads = tmp_path / "rows" / "payloads.bin"
    data = bytearray(payloads.read_bytes())
    data[int(rows._payload_starts[2]) + 3] ^= 0xFF
    payloads.write_bytes(bytes(data))
    with pytest.raises(DataError, match="the labels of row row-2"):
        TokenDataset(tmp_path / "rows").batch(np.arange(4))
    payloads.write_bytes(bytes(data[:-1]))
    with pytest.raises(DataError, match="cut short"):
        TokenDataset(tmp_path / "rows")


FILES = ("tokens.bin", "starts.npy", "first.npy", "n_encoded.npy", "payload_starts.npy", "ids.json")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_gone_is_a_sentence(name: str, tmp_path: Path) -> None:
    written(tmp_path / "rows", made.TOP3)
    path = tmp_path / "rows" / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cut short|damaged"):
        TokenDataset(tmp_path / "rows")
    path.unlink()
    with pytest.raises(DataError, match=r"cut short|not found"):
        TokenDataset(tmp_path / "rows")


@pytest.mark.parametrize("overflow", ["truncate_left", "truncate_right"])
def test_a_cut_prompt_is_the_one_that_the_teacher_read(
    overflow: str, tiny_llama: Model, tmp_path: Path
) -> None:
    settings = made.settings("generate", prompt="the {{ text }}", overflow=overflow)
    tokenizer = load_tokenizer(tiny_llama.path)
    shard, asked = [], []
    for split in ("train", "calibrate"):
        ids, answer = tokens(10), tokens(3)
        asked.append([49, *(ids[-4:] if overflow == "truncate_left" else ids[:4])])
        said = made.generated(
            text(answer), answer, made.distributions(3), n_prompt_tokens=5, truncated=True
        )
        shard.append((made.row(text(ids), split), said))
    made.write_dataset(tmp_path, settings, [shard], codec=made.TOP3)
    counts = token_rows.build(tmp_path / "labels", tmp_path / "corpus", settings, tokenizer, 64,
                              tmp_path / "rows", as_text=False)  # fmt: skip
    batch = TokenDataset(tmp_path / "rows" / "train").batch(np.array([0]))
    assert batch.rows.ids.tolist() == [*asked[0], *batch.targets.tolist()]
    assert counts["left_out"] == 0


def test_labels_of_another_prompt_or_corpus_are_refused(tiny_llama: Model, tmp_path: Path) -> None:
    built(tmp_path, tiny_llama, "logits", some_rows(), context="is the")
    tokenizer = load_tokenizer(tiny_llama.path)
    other = made.settings("logits", context="is the the")
    with pytest.raises(DataError, match="another prompt or tokenizer"):
        token_rows.build(tmp_path / "labels", tmp_path / "corpus", other, tokenizer, 64,
                         tmp_path / "again", as_text=False)  # fmt: skip
    made.write_corpus(tmp_path / "other", [[made.row("w1")]])
    with pytest.raises(DataError, match="another corpus"):
        token_rows.build(tmp_path / "labels", tmp_path / "other", other, tokenizer, 64,
                         tmp_path / "again", as_text=False)  # fmt: skip


def test_a_task_prefix_stands_inside_the_users_message(tiny_llama: Model, tmp_path: Path) -> None:
    settings = made.settings("rationales", prompt="{{ text }}", chat=True)
    tokenizer = load_tokenizer(tiny_llama.path)
    tokenizer.chat_template = "<eos>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shard = [(made.row("w1", s), made.rationales(["w7"])) for s in ("train",)]
    shard += [(made.row("w2", "calibrate"), made.rationales(["w7"]))]
    made.write_dataset(tmp_path, settings, [shard])
    token_rows.build(tmp_path / "labels", tmp_path / "corpus", settings, tokenizer, 64,
                     tmp_path / "rows", as_text=True)  # fmt: skip
    batch = TokenDataset(tmp_path / "rows" / "train").batch(np.array([0]))
    assert batch.rows.ids[0] == tokenizer.eos_token_id


def test_an_empty_split_is_named(tiny_llama: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no calibrate rows"):
        built(tmp_path, tiny_llama, "logits", [(tokens(4), "train")])
    assert not (tmp_path / "rows" / "calibrate").exists()  # else the next run would go on with it


def test_whoever_writes_first_wins_and_nothing_is_left_over(tmp_path: Path) -> None:
    first, second = (written(tmp_path / "rows", made.TOP3, n=n) for n in (4, 6))
    assert len(first) == len(second) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_two_who_finish_at_once_both_find_the_rows(tmp_path: Path) -> None:
    """Neither sees the other's folder until both have all their rows."""
    both, row = threading.Barrier(2), TokenRow(id="a", tokens=np.array([1, 2]), first=1)

    def rows() -> Iterator[TokenRow]:
        yield row
        both.wait(10)

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(token_dataset.write, tmp_path / "rows", rows(), None) for _ in "ab"]
        assert [d.result() for d in done] == [1, 1]
    assert TokenDataset(tmp_path / "rows").ids == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_batches_are_decoded_ahead_and_their_errors_raised(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows", made.TOP3)
    parts = [np.array([i % 4]) for i in range(20)]
    ahead = list(token_dataset.prefetch(iter(parts), rows))
    assert [b.rows.ids.tolist() for b in ahead] == [rows.batch(p).rows.ids.tolist() for p in parts]
    with pytest.raises(IndexError):
        list(token_dataset.prefetch(iter([np.array([0]), np.array([99])]), rows))
    stopped = token_dataset.prefetch(iter(parts), rows)
    next(stopped)
    stopped.close()
    deadline = time.monotonic() + 5
    while any(t.name == "decoding" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "the decoding thread lives on"
        time.sleep(0.02)


def test_a_student_is_exported_with_the_chat_template_that_it_was_trained_with(
    tiny_llama: Model, tmp_path: Path
) -> None:
    """A base model, of a teacher with a template and an end of its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.path)
    tokenizer.chat_template = "the {% for m in messages %}{{ m['content'] }}{% endfor %} is"
    tokenizer.eos_token = "w44"
    tokenizer.save_pretrained(tmp_path / "teacher")
    teacher = dataclasses.replace(tiny_llama, path=tmp_path / "teacher")
    asked = make_causal_recipe().model_dump(mode="json")
    asked["labels"] = {"kind": "generate", "prompt": "{{ text }} w3", "chat": True, "k": 3}
    settings = recipe.parse(asked)
    prompt = tokenizer.encode("the w9 w3 is")
    said = made.generated("w1", [4, 47], made.distributions(2), n_prompt_tokens=len(prompt))
    rows = [(made.row("w9", split), said) for split in ("train", "calibrate")]
    made.write_dataset(tmp_path, settings.labels, [rows], codec=made.TOP3,
                       teacher=teacher.identity)  # fmt: skip
    step.write_rows(settings, tmp_path / "labels", tmp_path / "corpus", tiny_llama, teacher,
                    tmp_path / "rows")  # fmt: skip
    student = Causal(
        None, torch.device("cpu"), model_dir=tiny_llama.path, student=settings.learner(),
        training=settings.training, rows_dir=tmp_path / "rows",
    )  # fmt: skip
    student.write(models.copy_on_cpu(student.module), tmp_path / "student")
    exported = AutoTokenizer.from_pretrained(tmp_path / "student")
    chat = [{"role": "user", "content": "w9 w3"}]
    read = exported.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    batch = TokenDataset(tmp_path / "rows" / "train").batch(np.array([0]))
    assert read == prompt == batch.rows.ids[:-2].tolist()
    assert exported.eos_token == "w44"
    ends = GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids("w44"), 1]


def gold_rows(
    run: Path, tokenizer: Any, rows: Sequence[tuple[dict[str, Any], str]], **labels: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """What is learned of each calibrate row (what was said, gold), and what would be right."""
    settings = made.settings("generate", prompt="the {{ text }}", **labels)
    shard = [(made.row("w0"), said(rows[0][0]))]
    shard += [
        (made.row(f"w{i}", "calibrate", gold), said(answer))
        for i, (answer, gold) in enumerate(rows)
    ]
    made.write_dataset(run, settings, [shard], codec=made.TOP3)
    token_rows.build(run / "labels", run / "corpus", settings, tokenizer, 64, run / "rows",
                     as_text=False)  # fmt: skip
    learned, right = (TokenDataset(run / "rows" / s) for s in ("calibrate", token_rows.GOLD))
    assert learned.ids == right.ids
    return tuple(
        [found.batch(np.array([i])).targets.tolist() for i in range(len(found))]
        for found in (learned, right)
    )


def said(answer: dict[str, Any]) -> Any:
    """Behind a prompt of two tokens."""
    n_tokens = len(answer["token_ids"])
    return made.generated(**{"probabilities": made.distributions(n_tokens), "n_prompt_tokens": 2}
                          | answer)  # fmt: skip


def test_a_right_answer_ends_with_the_stop_string_that_the_teachers_ended_with(
    tiny_llama: Model, tmp_path: Path
) -> None:
    """Which is learned, in place of the tokenizer's own end."""
    w5, w6, stop = 8, 9, 48
    answer = {"output": "w5", "token_ids": [w5, stop]}
    learned, right = gold_rows(
        tmp_path, load_tokenizer(tiny_llama.path), [(answer, "w5"), (answer, " w6")], stop=["is"]
    )
    assert learned == [[w5, stop], [w5, stop]] and right == [[w5, stop], [w6, stop]]


def test_a_right_answer_ends_with_the_token_that_ends_the_teachers_turn(
    tiny_llama: Model, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.path)
    w5, w6, turn = 8, 9, 47
    tokenizer.add_special_tokens({"additional_special_tokens": ["w44"]})
    assert tokenizer.convert_tokens_to_ids("w44") == turn
    answer = {"output": "w5", "token_ids": [w5, turn]}
    learned, right = gold_rows(tmp_path, tokenizer, [(answer, "w5"), (answer, "w6")])
    assert learned == [[w5, turn], [w5, turn]] and right == [[w5, turn], [w6, turn]]


def test_a_right_answer_has_the_tokenizers_end_where_the_teachers_was_cut_off(
    tiny_llama: Model, tmp_path: Path
) -> None:
    """And none where there is no room for it: answers of one token, say."""
    cut = {"output": "w5 w6", "token_ids": [8, 9], "finish_reason": "length"}
    _, right = gold_rows(
        tmp_path, load_tokenizer(tiny_llama.path),
        [(cut, "w5 w6"), (cut, "w7"), (cut, "w7 w8")], max_tokens=2,
    )  # fmt: skip
    assert right == [[8, 9], [10, 1], [10, 11]]


@pytest.mark.parametrize("killed_at", [token_rows.GOLD, "train", "calibrate"])
def test_a_kill_while_rows_are_written_loses_no_right_answers(
    killed_at: str, tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are there are not written again: right answers must be there before them."""
    asked = make_causal_recipe().model_dump(mode="json")
    asked["labels"] = {"kind": "generate", "prompt": "the {{ text }}", "k": 3}
    settings = recipe.parse(asked)
    answer = said({"output": "w5", "token_ids": [8, 1]})
    shard = [(made.row("w1"), answer), (made.row("w2", "calibrate", "w5"), answer)]
    made.write_dataset(tmp_path, settings.labels, [shard], codec=made.TOP3,
                       teacher=tiny_llama.identity)  # fmt: skip
    given = (settings, tmp_path / "labels", tmp_path / "corpus", tiny_llama, tiny_llama,
             tmp_path / "rows")  # fmt: skip
    take_name = token_dataset.take_name

    def dying(fresh: Path, folder: Path) -> None:
        if folder.name == killed_at:
            raise KeyboardInterrupt
        take_name(fresh, folder)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(token_dataset, "take_name", dying)
        step.write_rows(*given)
    step.write_rows(*given)
    assert not list(tmp_path.rglob(".*"))
    assert TokenDataset(tmp_path / "rows" / token_rows.GOLD).ids == [shard[1][0]["id"]]
