"""``journeyman init``: a file of one's own to a recipe that runs, or one sentence."""

import argparse
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from journeyman import cli, corpus, recipe
from journeyman.cli.init import choose
from journeyman.errors import JourneymanError
from journeyman.labels.trying import ways
from journeyman.starting.draft import DEMO_TEACHER, draft, parsed, split_map, words_of
from journeyman.starting.look import look
from tests.conftest import ROOT


def init(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What it says; the file is recipe.yaml in the working directory."""
    capsys.readouterr()
    code = cli.main(["init", *map(str, arguments), "--to", "recipe.yaml"])
    said = capsys.readouterr()
    assert code == (0 if not said.err else 1)
    assert said.err.count("\n") <= 1  # one sentence
    return said.err or said.out


def prepared(*overrides: str) -> dict:
    """The corpus of recipe.yaml."""
    settings = recipe.load("recipe.yaml", overrides)
    return corpus.prepare(settings, Path("corpus"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("file", "flags", "text", "label"),
    [
        ("clinc150/requests.jsonl.gz", ["--label", "domain"], "text", "domain"),
        ("sms_spam/messages.tsv.gz", [], "text", "label"),
        ("policy/requests.jsonl.gz", ["--label", "decision"], "text", "decision"),
        ("xquad/pairs.jsonl.gz", ["--group", "article"], "question", "label"),
        ("wikitext/sentences.txt.gz", ["--class", "a=people", "--class", "b=places"], "text", None),
        ("gsm8k/problems.jsonl.gz", ["--no-label", "--class", "a=money", "--class", "b=time"],
         "question", None),
    ],
)  # fmt: skip
def test_each_shipped_file_gives_a_recipe_that_prepares(capsys, file, flags, text, label):
    source = ROOT / "jobs" / "recipes" / file
    assert "next      journeyman recipe check recipe.yaml" in init(capsys, source, *flags)
    columns = recipe.load("recipe.yaml").corpus.columns
    assert (columns.text, columns.label) == (text, label)
    assert prepared()["splits"].keys() == {"train", "calibrate", "certify", "test"}


ODD = 'Ticket Body (en),"Team, current",Kunden-Nr.: #\n'


def test_odd_column_names_and_quoted_newlines(capsys):
    rows = [f'"line one of {i}\nline: ""two"" # {i}","a: b{i % 3}",{i // 4}\n' for i in range(120)]
    Path("odd: file.csv").write_text(ODD + "".join(rows))
    init(capsys, "odd: file.csv", "--text", "Ticket Body (en)", "--label", "Team, current",
         "--group", "Kunden-Nr.: #")  # fmt: skip
    settings = recipe.load("recipe.yaml")
    assert settings.classes().classes == {f"a: b{i}": f"a b{i}" for i in range(3)}
    manifest = prepared()
    assert manifest["rows"] + manifest["over_limit"] == 120 and not manifest["malformed"]["rows"]
    texts = corpus.read_shard(Path("corpus"), manifest["shards"][0]["name"])["text"].to_pylist()
    assert all("\nline: " in text for text in texts)


def test_splits_are_those_of_the_whole_file(capsys):
    splits = ["train"] * 2500 + ["val"] * 300 + ["test"] * 200
    rows = [{"text": f"request {i}", "label": "ab"[i % 2], "split": split}
            for i, split in enumerate(splits)]  # fmt: skip
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(capsys, "rows.jsonl")
    assert set(recipe.load("recipe.yaml").corpus.split_map) == {"train", "val", "test"}
    made = prepared()
    assert made["without_split"] == 0 and all(made["splits"].values()), made


def with_splits(splits: list[str], suffix: str = ".jsonl") -> Path:
    """Rows of two labels, six to a customer; the splits take turns."""
    path = Path(f"rows{suffix}")
    rows = [{"text": f"request {i}", "label": "ab"[i % 2], "who": i // 6,
             "part": splits[i % len(splits)]} for i in range(120)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("splits", "flags", "why"),
    [
        (["train", "train", "test"], ["--group", "who"], "the group '0' of column who is in sev"),
        (["validation"], [], "no row is in train"),
    ],
)
def test_splits_that_cannot_be_kept_are_dealt_anew_and_that_is_said(capsys, splits, flags, why):
    said = init(capsys, with_splits(splits), *flags)
    assert f"note      the splits of column part are not kept: {why}" in said
    made = prepared()
    assert made["rows"] + made["over_limit"] == 120 and all(made["splits"].values()), made
    Path("recipe.yaml").unlink()
    said = init(capsys, with_splits(splits), *flags, "--split", "part")
    assert f"--split part: {why}" in said and not Path("recipe.yaml").exists()


def test_splits_are_known_in_any_case_and_others_are_refused(capsys):
    init(capsys, with_splits(["Train", "VAL", "test "]))
    made = prepared()
    assert not made["without_split"] and all(made["splits"].values()), made
    said = init(capsys, with_splits(["train", "elsewhere"]), "--split", "part")
    assert "--split part: 'elsewhere' is none of train, training, val" in said


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "test"], {"train": 0.65, "calibrate": 0.1, "certify": 0.25}),
        (["train", "dev"], "train"),
        (["train", "calibrate", "certify", "test"], "train"),
        (["train", "calibrate", "certify"], {"train": 0.85, "test": 0.15}),
    ],
)
def test_what_no_split_of_the_file_is_for_is_taken_from_train(names, expected):
    mapped = split_map(names)
    assert mapped["train"] == expected
    assert all(mapped[name] == name for name in names if name not in ("train", "dev"))


def test_labels_in_quotation_marks_of_a_tsv_are_told(capsys):
    rows = [f"text {i}\t{'a' if i else chr(34) + 'a' + chr(34)}{'b' if i % 2 else ''}\n"
            for i in range(60)]  # fmt: skip
    Path("a.tsv").write_text("text\tlabel\n" + "".join(rows))
    assert 'the label "a" stands in quotation marks' in init(capsys, "a.tsv")


def test_a_blank_label_is_none(capsys):
    rows = [f"text {i},{('a', 'b', '  ')[i % 3]}\n" for i in range(90)]
    Path("a.csv").write_text("text,label\n" + "".join(rows))
    init(capsys, "a.csv")
    assert set(recipe.load("recipe.yaml").classes().classes) == {"a", "b"}
    prepared()


def test_a_file_whose_rows_cannot_be_read_is_no_recipe(capsys):
    broken = "\n".join("a,b,c,d" if i % 3 else f"text {i},x" for i in range(90))
    Path("rows.csv").write_text(f"text,label\n{broken}\n")
    said = init(capsys, "rows.csv", "--class", "x=one")
    assert "60 of 90 rows cannot be read" in said
    assert "(the first: 4 fields where the header has 2)" in said


def test_odd_values_stay_what_they_are_in_yaml(capsys):
    labels = ["yes", "no", "null", "1", "0x1f", "{{ x }}", "#tag", "- a", "ü", "true", "'\"\\"]
    rows = [{"text": f"row {i}", "label": labels[i % len(labels)]} for i in range(220)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(capsys, "a.jsonl")
    assert set(recipe.load("recipe.yaml").classes().classes) == set(labels)
    prepared()


def test_a_hundred_labels(capsys):
    rows = [f"please do thing number {i},intent_{i % 100}\n" for i in range(2000)]
    Path("many.csv").write_text("utterance,intent\n" + "".join(rows))
    said = init(capsys, "many.csv")
    assert "intent_0 (intent 0)" in said
    assert "100 labels are as many prefills a row: some 18 minutes of this teacher" in said
    assert "for 300 rows, in which a label stands some 3.0 times" in said
    settings = recipe.load("recipe.yaml")
    assert len(settings.classes().classes) == 100
    assert sum(settings.corpus.limits.values()) <= 300
    assert "100 labels are as many short prefills a row" in Path("recipe.yaml").read_text()
    prepared()


def test_parquet_and_dataset_folders(capsys):
    rows = [{"id": i, "body": f"some words {i}", "queue": "ab"[i % 2]} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    init(capsys, "a.parquet")
    assert recipe.load("recipe.yaml").corpus.columns.label == "queue"
    Path("recipe.yaml").unlink()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    parts = {
        name: datasets.Dataset.from_list(
            [{"text": f"{name} {i}", "label": i % 2} for i in range(n)], features=features
        )
        for name, n in (("train", 80), ("validation", 40), ("test", 20))
    }
    datasets.DatasetDict(parts).save_to_disk("folder")
    init(capsys, "folder")
    settings = recipe.load("recipe.yaml").corpus
    assert settings.columns.split == "split"
    assert settings.split_map["validation"] == {"calibrate": 0.3, "certify": 0.7}
    assert prepared()["splits"]["test"] == 20


def latin(text: str) -> bytes:
    return text.encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", latin("text,étiquette\nhello,x\n"), "the header is not UTF-8; save the file as"),
        ("a.tsv", latin("text\tétiquette\nhello\tx\n"), "the header is not UTF-8"),
        ("a.csv", latin("text,label\nça va,x\n"), "all of its 1 rows are malformed (not UTF-8 at"),
        ("a.jsonl", latin('{"é": "x"}\n'), "save the file as UTF-8"),
        ("a.csv", "text,label\nhi,a\n".encode("utf-16"), "the header is not UTF-8"),
        ("a.parquet", b"nope", "not a readable Parquet file"),
        ("a/state.json", b"{}", "a folder, but none that datasets' save_to_disk wrote"),
        ("a/dataset_info.json", b"{}", "not a readable Hugging Face dataset folder"),
        ("a/dataset_dict.json", b"[", "not a readable Hugging Face dataset folder"),
        ("a/dataset_dict.json", b'{"splits": ["x"]}', "not a readable Hugging Face dataset folder"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(capsys, name, content, sentence):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert sentence in init(capsys, path.parent if path.parent.name else path)
    assert not Path("recipe.yaml").exists()


def test_columns_of_pictures_are_let_be(capsys):
    features = {"body": datasets.Value("string"), "queue": datasets.Value("string"),
                "picture": datasets.Image()}  # fmt: skip
    rows = [{"body": f"some words {i}", "queue": "ab"[i % 2], "picture": {"bytes": b"-"}}
            for i in range(40)]  # fmt: skip
    datasets.Dataset.from_list(rows, datasets.Features(features)).save_to_disk("folder")
    assert "body (text), queue (gold label)" in init(capsys, "folder")
    assert prepared()["splits"]["train"] == 20


@pytest.mark.parametrize(
    ("name", "content", "flags", "sentence"),
    [
        ("a.csv", "", [], "it has no rows, so that there is nothing to make a recipe for"),
        ("a.jsonl", "\n\n", [], "it has no rows"),
        ("a.jsonl", "{\n[]\n", [], "all of its 2 rows are malformed"),
        ("a.csv", "text;label\nhello;x\n", [], "the file seems to separate by ';'"),
        ("a.csv", "text,label\nhello,x\nhi,y\n", ["--label", "team"],
         "no column 'team'; it has 'text', 'label'. Name one of them with --label"),
        ("a.csv", "a,b\nxyz,1\nxyz,2\n", [], "which column holds the text is not plain"),
        ("a.csv", "text\nhello\nhi\n", [], "a classifier needs two labels at least, and there is"),
        ("a.csv", "text,label\nhello,x\nhi,x\n", ["--label", "label"], "there is 'x'"),
        ("a.csv", "text,label\na,x\nb,y\n", ["--class", "z=zz"], "--class z: no row has this"),
        ("a.csv", "text,label\na,x_1\nb,x-1\n", ["--label", "label"], "the same words, 'x 1'"),
        ("a.csv", "text,label\na,x\nb,y\n", ["--class", "z"], "write it as LABEL=WORDS"),
        ("a.csv", "text,label\na,x\nb,y\n", ["--name", "a b"], "name: string should match"),
        ("a.csv", "text,n\n" + "".join(f"t{i},{i}\n" for i in range(600)), ["--label", "n"],
         "more than 500 different values, and looks like no label"),
        ("a.json", "[]", [], "the format cannot be told from the name; let it end in one of"),
        ("a.csv", "text,text,label\na,b,x\nc,d,y\n", [], "two columns are called 'text'"),
        ("a.csv", "body,text,label\na,b,x\nc,d,y\n", ["--text", "body", "--meta", "text"],
         "columns.meta: text stands for the row's text in templates"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_a_recipe_is_one_sentence(capsys, name, content, flags, sentence):
    Path(name).write_text(content)
    assert sentence in init(capsys, name, *flags)
    assert not Path("recipe.yaml").exists()


def test_a_file_that_is_there_is_never_overwritten(capsys):
    Path("recipe.yaml").write_text("mine")
    Path("a.csv").write_text("text,label\na,x\nb,y\n")
    assert "recipe.yaml: there already" in init(capsys, "a.csv")
    assert Path("recipe.yaml").read_text() == "mine"
    assert "no such file" in init(capsys, "b.csv")


def options(**given: object) -> argparse.Namespace:
    nothing = {
        "text": None, "label": None, "no_label": False, "classes": [], "group": None,
        "split": None, "meta": [], "teacher": "big", "student": "small", "scoring": None,
        "name": None,
    }  # fmt: skip
    return argparse.Namespace(**nothing | given)


def test_in_a_terminal_it_asks_for_what_no_flag_says():
    Path("a.csv").write_text("who,what,why\nann,hello,x_y\nbob,hi,z\n")
    answers = {
        "Which column holds the text?": "what",
        "Which column holds gold labels? (- for none)": "why",
        "Which column's rows must stay in one split (a customer's, say)? (- for none)": "who",
        "Words for the label z?": "zebras",
    }
    chosen = choose(
        options(), look("a.csv"), lambda question, default: answers.get(question, default)
    )
    assert (chosen.text, chosen.label, chosen.group) == ("what", "why", "who")
    assert chosen.classes == {"x_y": "x y", "z": "zebras"}
    settings = parsed(draft(chosen))
    assert settings.classes().scoring == "verbalizer" and settings.classes().chat
    assert settings.cluster.gpus_per_replica == settings.training.gpus_per_worker == 1
    assert settings.cascade.teacher_gpus == 1


@pytest.mark.parametrize("scoring", [None, "direct", "verbalizer", "channel"])
@pytest.mark.parametrize("teacher", [DEMO_TEACHER, "big"])
def test_there_are_two_other_ways_to_ask_from_the_start(scoring: str | None, teacher: str):
    Path("a.csv").write_text("text,label\nhello,x_y\nhi,z\n")
    chosen = choose(options(scoring=scoring, teacher=teacher), look("a.csv"), None)
    asked = [way.asked() for way in ways(parsed(draft(chosen))).values()]
    assert len(asked) == 3 and all(asked.count(one) == 1 for one in asked)


def test_a_small_file_is_told_what_it_is_too_small_for(capsys):
    def write(n: int, split: str = "") -> None:
        Path("recipe.yaml").unlink(missing_ok=True)
        part = [",train", ",val", ",test"] if split else [""]
        rows = [f"text {i},{'ab'[i % 2]}{part[i % len(part)]}\n" for i in range(n)]
        Path("a.csv").write_text(f"text,label{split}\n{''.join(rows)}")

    write(40)
    said = init(capsys, "a.csv")
    assert "40 rows are few: about 20 train, 4 calibrate, 10 certify, 6 test" in said
    assert "A promise of 10% takes 22 certify rows" in said
    assert 0.9**22 < 0.1 < 0.9**21  # P(no error among so many, where one in ten is)
    write(200, ",split")
    said = init(capsys, "a.csv")
    assert "about 67 train, 20 calibrate, 47 certify, 30 test" in said and "takes 22" not in said
    assert prepared()["splits"] == pytest.approx(
        {"train": 67, "calibrate": 20, "certify": 47, "test": 30}, abs=8
    )
    write(300)
    assert "are few" not in init(capsys, "a.csv")


def test_without_gold_the_labels_are_asked_for():
    Path("a.csv").write_text("text\nhello\nhi\n")
    answers = {"Labels, separated by commas?": "spam, ham"}
    chosen = choose(
        options(), look("a.csv"), lambda question, default: answers.get(question, default)
    )
    assert chosen.classes == {"spam": "spam", "ham": "ham"} and chosen.label is None
    assert "accuracy" not in yaml.safe_load(draft(chosen))["certify"].get("besides", [])


@pytest.mark.parametrize(
    ("label", "words"),
    [("kitchen_and_dining", "kitchen and dining"), ("billingTeam", "billing team"), ("__", "__")],
)
def test_words_of_a_label(label: str, words: str):
    assert words_of(label) == words


def test_a_column_that_is_missing_names_those_that_are_there():
    Path("a.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(JourneymanError, match="no column 'who'; it has 'text', 'label'"):
        choose(options(group="who"), look("a.csv"), None)
