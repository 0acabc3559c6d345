"""``journeyman labels`` and ``label --estimate`` as a user meets them: words, status, files."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import yaml

from journeyman import steps
from journeyman.cli import main
from journeyman.labels import quality
from journeyman.labels.schema import SCHEMA_VERSION
from journeyman.labels.store import LabelStore
from tests.conftest import journeyman
from tests.journeyman.labels.synthetic import (
    TOP3,
    classes,
    distributions,
    generated,
    quarantined,
    rationales,
    recipe_of,
    row,
    settings,
    write_dataset,
)


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What the command prints: on standard output where it succeeds, else on standard error."""
    assert main([str(a) for a in arguments]) == status
    printed = capsys.readouterr()
    if status:
        assert printed.out == ""
        assert printed.err.startswith("journeyman: ")
        assert printed.err.count("\n") == 1, printed.err
        return printed.err
    return printed.out


def write_recipe(run: Path, kind: str = "classes", **labels: object) -> Path:
    """A recipe whose run's folder is ``run``."""
    recipe = recipe_of(kind, run.parent, **labels).model_dump(mode="json")
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"name": run.name}))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder: one row with much label mass, one with little, one in quarantine."""
    bad = row("a poison row", "train", "yes")
    shard = [
        (row("is the sky blue?", "train", "yes"), classes(0.9, 0.1, label_mass=0.8)),
        (row("is grass red?", "test", "no"), classes(0.7, 0.3, label_mass=0.05)),
        (bad, quarantined(bad, "ContextOverflow", "the prompt has 9000 tokens.")),
    ]
    write_dataset(tmp_path / "colours", settings("classes"), [shard])
    return tmp_path / "colours"


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    rows = [(row("Capital of France?"), generated("Paris.", [1, 2], distributions(2)))]
    write_dataset(tmp_path / "spoken", settings("generate"), [rows], codec=TOP3)
    return tmp_path / "spoken"


# --- which dataset is meant ---


def test_a_recipe_a_run_and_a_dataset_name_the_same_labels(run: Path, capsys):
    recipe = write_recipe(run)
    by_recipe, by_run, by_folder, by_url = (
        said(capsys, "labels", "stats", where)
        for where in (recipe, run, run / "labels", f"file://{run / 'labels'}")
    )
    assert by_recipe == by_run == by_folder
    assert by_url.splitlines()[1:] == by_folder.splitlines()[1:]
    moved = run.parent / "moved"
    (run / "labels").rename(moved)
    elsewhere = f"labels.destination={moved}"
    found = said(capsys, "labels", "stats", recipe, "--set", elsewhere)
    assert found.splitlines()[1:] == by_folder.splitlines()[1:]


@pytest.mark.parametrize("action", ["stats", "show", "card", "export"])
def test_where_there_are_no_labels_one_sentence_says_what_to_do(
    tmp_path: Path, capsys, action: str
):
    more = ["--format", "jsonl", "--out", tmp_path / "out"] if action == "export" else []
    words = said(capsys, "labels", action, tmp_path / "none", *more, status=1)
    assert "there is no label dataset (no manifest.json); name its folder" in words
    recipe = write_recipe(tmp_path / "run")
    words = said(capsys, "labels", action, recipe, *more, status=1)
    assert f"there are no labels yet; run journeyman label {recipe}" in words


def test_labels_of_an_older_version_are_refused_in_one_sentence(run: Path, capsys):
    path = run / "labels" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    words = said(capsys, "labels", "show", run, status=1)
    assert f"schema 1, this version reads {SCHEMA_VERSION}" in words


def test_a_setting_without_a_recipe_is_refused(run: Path, capsys):
    words = said(capsys, "labels", "stats", run, "--set", "name=other", status=1)
    assert "--set changes a recipe" in words


# --- show ---


def test_show_puts_the_text_beside_what_the_teacher_said(run: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = said(capsys, "labels", "show", run, "--rows", "1")
    head, first, second, mass = text.splitlines()[-4:]
    assert head == f"{row('is the sky blue?')['id']}  train  gold yes"
    assert first.split() == ["is", "the", "sky", "blue?", "yes", "0.900", "██████████████▍"]
    assert second.split() == ["no", "0.100", "█▋"]
    assert mass.split() == ["label", "mass", "0.8"]
    assert all(line == line.rstrip() for line in text.splitlines())


def test_show_sums_up_the_least_likely_of_many_classes(tmp_path: Path, capsys):
    names = {f"class {i}": f"Class {i}" for i in range(10)}
    rows = [(row("x"), classes(*np.arange(10, 0, -1) / 55))]
    write_dataset(tmp_path / "r", settings("classes", classes=names), [rows])
    lines = said(capsys, "labels", "show", tmp_path / "r").splitlines()
    assert "class 7" in lines[-3]
    assert lines[-2].split() == ["2", "more", "0.055"]  # 2/55 and 1/55


def test_show_only_rows_of_one_fate(run: Path, capsys):
    assert "is grass red?" in said(capsys, "labels", "show", run, "--only", "wrong")
    text = said(capsys, "labels", "show", run, "--only", "quarantined")
    assert "quarantined: ContextOverflow: the prompt has 9000 tokens." in text
    assert "a poison row" in text
    assert "No such row." in said(capsys, "labels", "show", run, "--split", "certify")


def test_show_tokens_of_an_answer_by_id_without_the_tokenizer(spoken: Path, capsys):
    text = said(capsys, "labels", "show", spoken, "--positions", "1", "--top", "2")
    assert "Paris." in text
    assert "Tokens by their ids: the teacher's tokenizer is not on this machine." in text
    assert "1 more" in text
    best = np.sort(distributions(2)[0])[-2:][::-1]
    assert f"{best[0]:.2f}" in text
    assert text.count("beyond the stored") == 1


def test_show_cuts_long_texts_unless_asked_for_one_row(tmp_path: Path, capsys):
    long = row("word " * 400)
    write_dataset(tmp_path / "r", settings("classes"), [[(long, classes(0.5, 0.5))]])
    assert "(1,299 more characters)" in said(capsys, "labels", "show", tmp_path / "r")
    whole = said(capsys, "labels", "show", tmp_path / "r", "--id", long["id"][:6])
    assert whole.count("word") == 400


def test_show_obeys_no_control_characters_of_a_text(tmp_path: Path, capsys):
    evil = row("red \x1b[31m bell \x07 [bold]markup[/bold]")
    rows = [(evil, rationales(["4\x1b[0m"]))]
    write_dataset(tmp_path / "r", settings("rationales", samples=1), [rows])
    text = said(capsys, "labels", "show", tmp_path / "r")
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]" in text


# --- stats, diff ---


def test_stats_say_what_became_of_every_row(tmp_path: Path, capsys):
    bad = row("a poison row", "train", "yes")
    shard = [
        (row("is the sky blue?", "train", "yes"), classes(0.9, 0.1, label_mass=0.8)),
        (row("is grass red?", "train", "no"), classes(0.7, 0.3, label_mass=0.05)),
        (bad, quarantined(bad, "ContextOverflow", "the prompt has 9000 tokens.")),
    ]
    store = write_dataset(tmp_path / "run", settings("classes"), [shard])
    recipe = recipe_of("classes", filters={"min_label_mass": 0.1})
    store.finish(quality.apply(store, store.manifest(), recipe))
    text = said(capsys, "labels", "stats", tmp_path / "run")
    lines = {line.split("  ")[0].strip(): " ".join(line.split()) for line in text.splitlines()}
    assert lines["rows"] == "rows 3 = 1 labeled + 1 in quarantine + 1 filtered"
    assert lines["filtered"] == "filtered min_label_mass 1"
    assert lines["as gold"] == "as gold 1.000 (95%: 0.025 to 1.000) of 1 rows with gold"
    assert lines["yes"] == "yes 1 100.0% 1 100.0% 1.000"
    assert lines["ContextOverflow"].startswith("ContextOverflow 1 ")
    figures = json.loads(said(capsys, "labels", "stats", tmp_path / "run", "--json"))
    assert figures["rows"] == 3
    assert figures["with_gold"]["n"] == 1


def test_unfinished_labels_are_shown_counted_and_exported_with_a_line_that_says_so(
    tmp_path: Path, capsys
):
    rows = [(row("x"), classes(0.9, 0.1))]
    write_dataset(tmp_path / "r", settings("classes"), [rows], complete=False)
    out = tmp_path / "rows.jsonl"
    for command in (
        ["show", tmp_path / "r"],
        ["stats", tmp_path / "r"],
        ["export", tmp_path / "r", "--format", "jsonl", "--out", out],
        ["diff", tmp_path / "r", tmp_path / "r"],
    ):
        assert "Not finished: this is of 1 shard" in said(capsys, "labels", *command)
    assert len(out.read_text().splitlines()) == 1
    words = said(capsys, "labels", "card", tmp_path / "r", status=1)
    assert "not finished; run journeyman label again" in words


def test_diff_names_the_settings_and_the_rows_that_differ(run: Path, tmp_path: Path, capsys):
    rows = [
        (row("is the sky blue?", "train", "yes"), classes(0.9, 0.1)),
        (row("is grass red?", "test", "no"), classes(0.2, 0.8)),
    ]
    other = tmp_path / "other"
    write_dataset(other, settings("classes", prompt="{{ text }}?"), [rows])
    text = said(capsys, "labels", "diff", run, other)
    flat = " ".join(text.split())
    assert 'labels.prompt "{{ text }} Yes or no?" "{{ text }}?"' in flat
    assert "rows in both 2" in flat
    assert "same likeliest class 0.500" in flat
    assert "A yes 0.700 B no 0.800" in flat
    assert json.loads(said(capsys, "labels", "diff", run, other, "--json"))["both"] == 2
    same = said(capsys, "labels", "diff", run, run)
    assert "Made in the same way, of the same corpus." in same
    assert "No row differs." in same


def test_diff_of_two_kinds_is_refused(run: Path, spoken: Path, capsys):
    assert "only datasets of one kind" in said(capsys, "labels", "diff", run, spoken, status=1)


# --- export, card ---


def test_export_writes_a_folder_that_datasets_loads(run: Path, tmp_path: Path, capsys):
    out = tmp_path / "hf"
    text = said(capsys, "labels", "export", run, "--format", "hf", "--out", out)
    assert text.startswith(f"{out}: 2 rows, ")
    assert datasets.load_from_disk(str(out))["text"][0] == "is the sky blue?"
    words = said(capsys, "labels", "export", run, "--format", "hf", "--out", out, status=1)
    assert "is there already; name another, or replace it with --force" in words
    said(capsys, "labels", "export", run, "--format", "hf", "--out", out, "--force")


def test_export_refuses_what_it_cannot_write(run: Path, tmp_path: Path, capsys):
    def refused(format_: str, out: object) -> str:
        return said(capsys, "labels", "export", run, "--format", format_, "--out", out, status=1)

    assert "take one of hf, jsonl, parquet" in refused("csv", tmp_path / "x")
    assert "on this machine" in refused("jsonl", "s3://bucket/x.jsonl")


def test_export_to_json_lines_says_that_distributions_are_left_out(
    spoken: Path, tmp_path: Path, capsys
):
    out = tmp_path / "x.jsonl"
    text = said(capsys, "labels", "export", spoken, "--format", "jsonl", "--out", out)
    assert "Without token distributions: --decode" in text
    assert "top_logprobs" not in json.loads(out.read_text())


def test_card_is_written_into_the_dataset(run: Path, capsys):
    path = said(capsys, "labels", "card", write_recipe(run)).strip()
    assert path == str(run / "labels" / "README.md")
    assert "# Classes labels by sage-7b" in Path(path).read_text()


# --- requeue, label --estimate ---


class FakeRun(steps.Run):
    """Does to the run's labels what another labeling of the quarantined rows would."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def requeue(self) -> steps.StepResult:
        store = LabelStore(self.labels)
        [commit] = store.commits().values()
        path = self.path("label") / "commits" / "part-00000.json"
        record = json.loads(path.read_text())
        record |= {"ok": commit.ok + commit.quarantined, "quarantined": 0, "quarantine": None}
        path.write_text(json.dumps(record))
        return steps.StepResult(name="requeue", manifest=store.manifest(), seconds=1.0)

    def estimate(self, rows: int) -> SimpleNamespace:
        return SimpleNamespace(text=lambda: f"estimated from {rows} rows")


def test_requeue_says_what_became_of_the_rows(run: Path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "Run", FakeRun)
    recipe = write_recipe(run)
    text = said(capsys, "labels", "requeue", recipe)
    assert text == "1 row was in quarantine: 1 labeled now, 0 in quarantine again.\n"
    text = said(capsys, "labels", "requeue", recipe)
    assert text == "No row is in quarantine: there is nothing to label again.\n"


def test_requeue_before_labeling_says_what_to_run(tmp_path: Path, capsys):
    words = said(capsys, "labels", "requeue", write_recipe(tmp_path / "run"), status=1)
    assert "there are no labels yet; run journeyman label" in words


def test_label_estimate_prints_what_the_sample_says(run: Path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "Run", FakeRun)
    recipe = write_recipe(run)
    assert said(capsys, "label", recipe, "--estimate") == "estimated from 200 rows\n"
    assert said(capsys, "label", recipe, "--estimate", "--rows", 9) == "estimated from 9 rows\n"
    words = said(capsys, "label", recipe, "--estimate", "--new", status=1)
    assert "give one" in words
    assert "--estimate" in said(capsys, "label", recipe, "--rows", 9, status=1)


# --- help ---


def test_help_of_every_action_teaches_by_example():
    text = journeyman("labels", "--help").stdout
    actions = ("show", "stats", "diff", "export", "card", "requeue")
    order = [text.index(f"    {name} ") for name in actions]
    assert order == sorted(order)
    assert "journeyman labels export my.yaml --format hf --out labels-hf" in text
    assert "--estimate --rows 500" in journeyman("label", "--help").stdout
    for action in actions:
        done = journeyman("labels", action, "--help")
        assert done.returncode == 0
        assert "RECIPE" in done.stdout or "A recipe" in done.stdout or "a recipe" in done.stdout


def test_recipe_check_refuses_a_filter_that_says_nothing(tmp_path: Path, capsys):
    recipe = write_recipe(tmp_path / "run", filters={"min_agreement": 0.6})
    words = said(capsys, "recipe", "check", recipe, status=1)
    assert "labels.filters.min_agreement: it compares the samples of rationales" in words
