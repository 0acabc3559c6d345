import bz2
import gzip
import itertools
import json
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from journeyman import corpus, recipe
from journeyman.cascade.feedback import table as feedback_table
from journeyman.columns import packed
from journeyman.errors import DataError, RecipeError
from journeyman.recipe import Recipe

ROWS = [
    {"text": "send ten euros to ann", "label": "bank", "split": "train"},
    {"text": "book a flight to rome", "label": "trip", "split": "train"},
    {"text": "what is my balance", "label": "bank", "split": "test"},
    {"text": "a hotel in, say, oslo", "label": "trip", "split": "certify"},
]


def made(sources: list[Path | str], **corpus_settings: Any) -> Recipe:
    settings = {"sources": [str(s) for s in sources], "columns": {"label": "label"}}
    return recipe.parse(
        {
            "name": "t",
            "corpus": settings | corpus_settings,
            "teacher": {"model": "unused"},
            "student": {"model": "unused"},
            "labels": {
                "scoring": "channel",
                "classes": {"bank": "money", "trip": "travel"},
                "prompt": "{{ label }}\n",
            },
        }
    )


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(directory: Path) -> list[dict[str, Any]]:
    names = [s["name"] for s in corpus.read_manifest(directory)["shards"]]
    return [row for name in names for row in corpus.read_shard(directory, name).to_pylist()]


def write_parquet(directory: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), directory / "rows.parquet")
    return directory / "rows.parquet"


def write_csv(directory: Path) -> Path:
    lines = ["text,label,split", *(f'"{r["text"]}",{r["label"]},{r["split"]}' for r in ROWS)]
    (directory / "rows.csv").write_text("\n".join(lines))
    return directory / "rows.csv"


def write_tsv(directory: Path) -> Path:
    lines = ["label\ttext\tsplit", *(f"{r['label']}\t{r['text']}\t{r['split']}" for r in ROWS)]
    (directory / "rows.tsv.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    return directory / "rows.tsv.bz2"


def write_jsonl(directory: Path) -> Path:
    content = "".join(json.dumps(row) + "\n\n" for row in ROWS)
    (directory / "rows.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    return directory / "rows.jsonl.gz"


def write_hf(directory: Path) -> Path:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bank", "trip"])}
    )
    parts = {}
    for split in ("train", "test", "certify"):
        rows = [{k: r[k] for k in ("text", "label")} for r in ROWS if r["split"] == split]
        parts[split] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(directory / "hf"))
    return directory / "hf"


@pytest.mark.parametrize("write", [write_parquet, write_csv, write_tsv, write_jsonl, write_hf])
def test_every_source_format_gives_the_same_corpus(tmp_path: Path, write):
    source = write(tmp_path)
    corpus.prepare(made([source], columns={"label": "label", "split": "split"}), tmp_path / "out")
    got = {(r["text"], r["label"], r["split"]) for r in rows_of(tmp_path / "out")}
    assert got == {(r["text"], r["label"], r["split"]) for r in ROWS}


def test_text_file_gives_a_row_a_line(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\nthree")
    corpus.prepare(made([tmp_path / "a.txt"], columns={}), tmp_path / "out")
    assert {r["text"] for r in rows_of(tmp_path / "out")} == {"one", "two", "three"}


def test_globs_and_urls_name_several_files(tmp_path: Path):
    jsonl(tmp_path / "a-1.jsonl", ROWS[:2])
    jsonl(tmp_path / "a-2.jsonl", ROWS[2:])
    manifest = corpus.prepare(made([f"file://{tmp_path}/a-*.jsonl"]), tmp_path / "out")
    assert manifest["rows"] == 4
    assert len(manifest["sources"]) == 2


def test_ids_depend_on_the_content_alone(tmp_path: Path):
    corpus.prepare(made([jsonl(tmp_path / "a.jsonl", ROWS)]), tmp_path / "a")
    corpus.prepare(made([jsonl(tmp_path / "b.jsonl", ROWS[::-1] * 2)]), tmp_path / "b")
    ids = [{r["text"]: (r["id"], r["split"]) for r in rows_of(tmp_path / d)} for d in "ab"]
    assert ids[0] == ids[1]
    assert all(len(row_id) == 32 for row_id, _ in ids[0].values())


def test_duplicates_collapse_and_conflicting_gold_is_settled_by_majority(tmp_path: Path):
    rows = [
        {"text": "same", "label": "bank"},
        {"text": "same", "label": "trip"},
        {"text": "same", "label": "trip"},
        {"text": "other", "label": "bank"},
    ]
    manifest = corpus.prepare(made([jsonl(tmp_path / "a.jsonl", rows)]), tmp_path / "out")
    same = next(r for r in rows_of(tmp_path / "out") if r["text"] == "same")
    assert (same["label"], same["count"]) == ("trip", 3)
    assert (manifest["rows"], manifest["duplicates"], manifest["conflicting_gold"]) == (2, 2, 1)
    by_split = {name: corpus.repeats(tmp_path / "out", name) for name in corpus.rows.SPLITS}
    assert by_split[same["split"]] == {same["id"]: 3}
    assert sum(map(len, by_split.values())) == 1


def test_a_text_in_two_splits_is_kept_out_of_training(tmp_path: Path):
    rows = [{**ROWS[0], "split": s} for s in ("test", "train")]
    source = jsonl(tmp_path / "a.jsonl", rows)
    corpus.prepare(made([source], columns={"split": "split"}), tmp_path / "out")
    assert [r["split"] for r in rows_of(tmp_path / "out")] == ["test"]


def test_splits_are_stable_when_the_corpus_grows_and_near_their_shares(tmp_path: Path):
    small = [{"text": f"row {i}", "label": "bank"} for i in range(1000)]
    large = small + [{"text": f"more {i}", "label": "bank"} for i in range(1000)]
    splits = []
    for name, rows in (("small", small), ("large", large)):
        corpus.prepare(made([jsonl(tmp_path / f"{name}.jsonl", rows)]), tmp_path / name)
        splits.append({r["id"]: r["split"] for r in rows_of(tmp_path / name)})
    assert splits[0].items() <= splits[1].items()
    shares = Counter(splits[1].values())
    assert abs(shares["train"] / 2000 - 0.7) < 0.05  # 5 standard errors
    assert abs(shares["test"] / 2000 - 0.1) < 0.035


def test_rows_of_one_group_fall_into_one_split(tmp_path: Path):
    rows = [{"text": f"row {i}", "label": "bank", "user": i % 50} for i in range(500)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    columns = {"label": "label", "group": "user", "meta": ["user"]}
    corpus.prepare(made([source], columns=columns), tmp_path / "out")
    groups: dict[int, set[str]] = {}
    for row in rows_of(tmp_path / "out"):
        groups.setdefault(json.loads(row["meta"])["user"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in groups.values())


def test_rows_without_a_group_are_no_group(tmp_path: Path):
    lines = ["text,who", *(f"row {i}," for i in range(200)), "a,ann", "b,ann"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    settings = made([tmp_path / "rows.csv"], columns={"group": "who"})
    shares = corpus.prepare(settings, tmp_path / "corpus")["splits"]
    assert sum(n > 0 for n in shares.values()) >= 3, shares
    groups = corpus.read_manifest(tmp_path / "corpus")["groups"]
    assert sum(groups.values()) == 201, "200 rows in none, and ann's two"


def test_a_blank_gold_label_is_none(tmp_path: Path):
    lines = ["text,label,split", "a,,train", "b,bank,train", "a,trip,train"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    split = {"columns": {"label": "label", "split": "split"}}
    corpus.prepare(made([tmp_path / "rows.csv"], **split), tmp_path / "corpus")
    gold = {row["text"]: row["label"] for row in rows_of(tmp_path / "corpus")}
    assert gold == {"a": "trip", "b": "bank"}


def test_values_that_json_has_no_word_for_are_kept_as_text(tmp_path: Path):
    rows = [{"text": "a", "at": datetime(2026, 1, 2, 3, 4), "cost": Decimal("1.50"),
             "raw": b"\x00", "tags": [date(2026, 1, 2)]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    settings = made([tmp_path / "rows.parquet"], columns={"meta": ["at", "cost", "raw", "tags"]})
    corpus.prepare(settings, tmp_path / "corpus")
    meta = json.loads(rows_of(tmp_path / "corpus")[0]["meta"])
    assert meta["at"].startswith("2026-01-02 03:04") and meta["cost"] == "1.50"
    assert meta["tags"] == ["2026-01-02"]


def test_gold_is_no_column_for_templates(tmp_path: Path):
    with pytest.raises(RecipeError, match="label is the gold label, which a template could"):
        made([tmp_path / "rows.csv"], columns={"label": "label", "meta": ["label"]})


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n{"text": "b"}\n')
    manifest = corpus.prepare(made([tmp_path / "rows.jsonl"], columns={}), tmp_path / "corpus")
    assert manifest["rows"] == 2
    (tmp_path / "rows.txt").write_bytes(b"\xef\xbb\xbfa\nb\n")
    corpus.prepare(made([tmp_path / "rows.txt"], columns={}), tmp_path / "texts")
    assert sorted(row["text"] for row in rows_of(tmp_path / "texts")) == ["a", "b"]


def test_a_row_of_two_groups_in_different_splits_is_in_neither(tmp_path: Path):
    rows = [{"text": f"row {i}", "label": "bank", "user": i % 50} for i in range(500)]
    rows += [{"text": "everybody says so", "label": "bank", "user": i} for i in range(50)]
    columns = {"label": "label", "group": "user", "meta": ["user"]}
    source = jsonl(tmp_path / "a.jsonl", rows)
    corpus.prepare(made([source], columns=columns), tmp_path / "out")
    texts = [row["text"] for row in rows_of(tmp_path / "out")]
    assert len(texts) == 500 and "everybody says so" not in texts
    assert corpus.read_manifest(tmp_path / "out")["in_several_groups"] == 1


def test_a_source_whose_splits_cut_through_a_group_is_refused(tmp_path: Path):
    rows = [
        {"text": "a", "label": "bank", "user": "u1", "split": "train"},
        {"text": "b", "label": "bank", "user": "u1", "split": "test"},
    ]
    source = jsonl(tmp_path / "a.jsonl", rows)
    columns = {"label": "label", "group": "user", "split": "split"}
    with pytest.raises(DataError, match="row 2: the group 'u1' of column user is in the splits"):
        corpus.prepare(made([source], columns=columns), tmp_path / "out")


def test_rows_of_one_group_stand_together_in_an_order_of_chance(tmp_path: Path):
    rows = [{"text": f"row {i}", "label": "bank", "user": f"u{i % 40}"} for i in range(400)]
    columns = {"label": "label", "group": "user", "meta": ["user"]}
    limits = dict.fromkeys(("train", "calibrate", "certify", "test"), 150)
    source = jsonl(tmp_path / "a.jsonl", rows)
    corpus.prepare(made([source], columns=columns, limits=limits), tmp_path / "out")
    found = [(row["split"], json.loads(row["meta"])["user"]) for row in rows_of(tmp_path / "out")]
    blocks = [key for key, _ in itertools.groupby(found)]
    assert len(blocks) == len(set(blocks)) == 40
    train = [user for split, user in blocks if split == "train"]
    assert train != sorted(train) and train != sorted(train, key=lambda user: int(user[1:]))
    alone = made([source], columns={"label": "label"}, limits={"train": 150}, shares={"train": 1.0})
    together = made([source], columns=columns, limits={"train": 150}, shares={"train": 1.0})
    of_each = []
    for number, settings in enumerate((alone, together)):
        corpus.prepare(settings, tmp_path / str(number))
        of_each.append({row["text"] for row in rows_of(tmp_path / str(number))})
    assert of_each[0] == of_each[1] and len(of_each[0]) == 150  # the choice is by row


def test_limits_take_the_same_rows_of_a_larger_corpus(tmp_path: Path):
    rows = [{"text": f"row {i}", "label": "bank"} for i in range(300)]
    limits = {"train": 50, "test": 5}
    source = jsonl(tmp_path / "a.jsonl", rows)
    manifest = corpus.prepare(made([source], limits=limits, rows_per_shard=20), tmp_path / "out")
    assert manifest["splits"]["train"] == 50
    assert manifest["splits"]["test"] == 5
    assert sum(s["rows"] for s in manifest["shards"]) == manifest["rows"]
    assert max(s["rows"] for s in manifest["shards"]) == 20


def test_malformed_rows_are_counted_listed_and_kept_aside(tmp_path: Path):
    lines = [json.dumps(row).encode() for row in ROWS * 30]
    lines[5] = b'{"text": "caf\xe9"}'
    lines[7] = b"{not json"
    lines[9] = b'{"text": 5}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    manifest = corpus.prepare(made([tmp_path / "a.jsonl"], max_malformed=0.05), tmp_path / "out")
    assert manifest["malformed"]["rows"] == 3
    reasons = {m["line"]: m["reason"] for m in manifest["malformed"]["first"]}
    assert reasons[6].startswith("not UTF-8")
    assert reasons[8].startswith("not JSON")
    assert reasons[10] == "no text in column text"
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert quarantine[0]["content"].rstrip() == lines[5]


def test_text_that_no_utf8_file_can_hold_is_malformed(tmp_path: Path):
    lines = [json.dumps(row) for row in ROWS * 30]
    lines[5] = r'{"text": "half \ud83d of a character"}'
    lines[7] = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    lines[9] = json.dumps({"text": "a whole one: \U0001f600", "label": "bank"})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    manifest = corpus.prepare(made([tmp_path / "a.jsonl"], max_malformed=0.05), tmp_path / "out")
    reasons = {m["line"]: m["reason"] for m in manifest["malformed"]["first"]}
    assert reasons.keys() == {6, 8}
    assert reasons[6] == "an escape spells half of a surrogate pair"
    assert reasons[8].startswith("not JSON: maximum recursion depth")


def test_parquet_strings_of_other_bytes_are_malformed(tmp_path: Path):
    texts = [*(f"row {i}".encode() for i in range(120)), b"caf\xe9", b"last"]
    column = pa.array(texts, pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    recipe_ = made([tmp_path / "a.parquet"], columns={}, max_malformed=0.05)
    manifest = corpus.prepare(recipe_, tmp_path / "out")
    assert manifest["rows"] == 121
    (bad,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert (bad["line"], bad["reason"], bad["content"]) == (121, "not UTF-8 at byte 3", b"caf\xe9")


def test_too_many_malformed_rows_stop_the_step_and_change_nothing(tmp_path: Path):
    good = made([jsonl(tmp_path / "good.jsonl", ROWS)])
    before = corpus.prepare(good, tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("no json\n" * 20)
    with pytest.raises(DataError, match=r"20 of 20 rows are malformed.*line 1: not JSON"):
        corpus.prepare(made([tmp_path / "bad.jsonl"]), tmp_path / "out")
    assert corpus.read_manifest(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "hold no rows"),
        (b'{"body": "hello"}\n', "no column text, label; it has body"),
        (b'{"text": "hello", "label": "taxi"}\n', "gold label 'taxi' of 1 rows has no label words"),
    ],
)
def test_unusable_corpus_gets_one_sentence(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        corpus.prepare(made([tmp_path / "a.jsonl"]), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_corrupt_parquet_gets_one_sentence(tmp_path: Path):
    whole = write_parquet(tmp_path).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet: not a readable Parquet file") as caught:
        corpus.prepare(made([tmp_path / "cut.parquet"]), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_missing_source_and_unknown_format_get_one_sentence(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        corpus.prepare(made([tmp_path / "none.jsonl"]), tmp_path / "out")
    (tmp_path / "a.dat").write_text("x")
    with pytest.raises(DataError, match=r"set corpus\.format"):
        corpus.prepare(made([tmp_path / "a.dat"]), tmp_path / "out")


def test_truncated_gzip_gets_one_sentence(tmp_path: Path):
    whole = write_jsonl(tmp_path).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read"):
        corpus.prepare(made([tmp_path / "cut.jsonl.gz"]), tmp_path / "out")


def test_damaged_gzip_gets_one_sentence(tmp_path: Path):
    whole = bytearray(gzip.compress(b'{"text": "a"}\n' * 5000))
    whole[20:30] = bytes(10)
    (tmp_path / "rows.jsonl.gz").write_bytes(bytes(whole))
    with pytest.raises(DataError, match="cannot be read"):
        corpus.prepare(made([tmp_path / "rows.jsonl.gz"], columns={}), tmp_path / "corpus")


def test_template_that_names_an_unknown_column_is_refused(tmp_path: Path):
    wrong = made([jsonl(tmp_path / "a.jsonl", ROWS)])
    labels = wrong.labels.model_copy(update={"target": "{{ passage }}"})
    with pytest.raises(RecipeError, match=r"labels\.target: the template names passage"):
        corpus.prepare(wrong.model_copy(update={"labels": labels}), tmp_path / "out")


def feedback(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """A cascade's feedback, by its own writer: texts and their splits."""
    facts = {
        "escalated": True,
        "propensity": 0.9,
        "label": "x",
        "answered_by": "teacher",
        "confidence": 0.1,
        "probabilities": [1.0],
        "bundle": "b",
        "received_at": 1.0,
    }
    folder.mkdir()
    table = feedback_table([{"text": text, "split": split, **facts} for text, split in rows])
    pq.write_table(table, folder / "20261126T100000-aa.parquet")
    return folder


def test_feedback_adds_escalations_to_train_and_audits_replace_what_was_held_out(tmp_path: Path):
    source = jsonl(
        tmp_path / "a.jsonl", [{"text": f"row {i}", "label": "bank"} for i in range(400)]
    )
    kept = feedback(
        tmp_path / "feedback",
        [(f"escalated {i}", "train") for i in range(50)]
        + [(f"audited {i}", "certify") for i in range(500)]
        + [("both", "train"), ("both", "certify"), ("row 3", "certify")],
    )
    corpus.prepare(made([source], feedback=str(kept)), tmp_path / "corpus")
    rows = rows_of(tmp_path / "corpus")
    splits = {row["text"]: row["split"] for row in rows}
    held_out = [text for text, split in splits.items() if split != "train"]
    assert all(text.startswith("audited") or text in ("both", "row 3") for text in held_out)
    assert len(held_out) == 502  # an audited text is never trained on, whatever else it was
    train = [text for text, split in splits.items() if split == "train"]
    assert sum(text.startswith("escalated") for text in train) == 50
    assert 0 < sum(text.startswith("row") for text in train) < 400
    assert 200 < list(splits.values()).count("certify") < 400
    manifest = corpus.read_manifest(tmp_path / "corpus")
    n_left_out = 400 - sum(text.startswith("row") for text in train) - 1
    assert manifest["without_split"] in (n_left_out, n_left_out + 1)  # row 3 may be either


def test_of_a_held_out_text_of_feedback_its_audits_alone_are_counted(tmp_path: Path):
    """By the coin they are as many of a text as it is of the traffic. What is escalated is kept
    each time: counted, too, it would make the rate by counts one of escalations."""
    source = jsonl(tmp_path / "a.jsonl", [{"text": "audited", "label": "bank"}] * 4)
    kept = feedback(
        tmp_path / "feedback",
        [("audited", "train")] * 3 + [("audited", "certify")] * 2 + [("audited", "train")] * 5
        + [("accepted", "certify")] * 2 + [("escalated", "train")] * 7,
    )  # fmt: skip
    corpus.prepare(made([source], feedback=str(kept)), tmp_path / "corpus")
    counts = {row["text"]: row["count"] for row in rows_of(tmp_path / "corpus")}
    assert counts == {"audited": 2, "accepted": 2, "escalated": 7}
    assert corpus.read_manifest(tmp_path / "corpus")["duplicates"] > 0


@pytest.mark.parametrize("named", [True, False], ids=["named by a template", "not named"])
def test_no_group_of_feedback_is_both_trained_on_and_held_out(tmp_path: Path, named: bool):
    """An article's audited rows are held out together, and none of its others is trained on; where
    requests bring no article, it is known of the rows alone that a source has too."""
    source = jsonl(
        tmp_path / "a.jsonl",
        [{"text": f"row {i}", "label": "bank", "article": f"a{i % 20}"} for i in range(200)],
    )

    def asked(text: str, article: str) -> str:
        return packed({"text": text, "article": article}, ("article", "text")) if named else text

    kept = feedback(
        tmp_path / "feedback",
        [(asked(f"escalated {i}", f"b{i % 40}"), "train") for i in range(200)]
        + [(asked(f"audited {i}", f"b{i % 10}"), "certify") for i in range(100)]
        + [(asked("row 3", "a3"), "certify")],
    )
    prompt = "{{ article }} {{ text }}" if named else "{{ text }}"
    recipe = made([source], feedback=str(kept), shares={"train": 1.0},
                  columns={"group": "article", "meta": ["article"]})  # fmt: skip
    recipe = recipe.model_copy(
        update={"labels": recipe.labels.model_copy(update={"prompt": prompt})}
    )
    corpus.prepare(recipe, tmp_path / "corpus")
    rows = rows_of(tmp_path / "corpus")
    assert {"row 3"} < {row["text"] for row in rows if row["split"] != "train"}
    splits: dict[str, set[str]] = {}
    for row in rows:
        article = json.loads(row["meta"]).get("article") if row["meta"] else None
        if article is not None:
            splits.setdefault(article, set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert splits["a3"] != {"train"} and splits["a4"] == {"train"}
    n_escalated = sum(row["text"].startswith("escalated") for row in rows)
    assert n_escalated == (150 if named else 200)  # of 10 articles of 40 some rows were audited
    left_out = corpus.read_manifest(tmp_path / "corpus")["in_several_groups"]
    assert left_out == 9 + (200 - n_escalated)


def test_feedback_without_files_is_refused_and_of_several_columns_is_taken_apart(tmp_path: Path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "row", "label": "bank", "title": "t"}] * 3)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no Parquet file there yet"):
        corpus.prepare(made([source], feedback=str(tmp_path / "none")), tmp_path / "corpus")
    columns = ("text", "title")
    asked_for = packed({"text": "a", "title": "b"}, columns)
    kept = feedback(tmp_path / "feedback", [(asked_for, "train")])
    asked = made([source], feedback=str(kept), columns={"meta": ["title"]})
    asked = asked.model_copy(
        update={"labels": asked.labels.model_copy(update={"prompt": "{{ title }} {{ text }}"})}
    )
    corpus.prepare(asked, tmp_path / "corpus")
    found = {
        (row["text"], json.loads(row["meta"])["title"]) for row in rows_of(tmp_path / "corpus")
    }
    assert ("a", "b") in found
