"""The command as a user runs it: what it says, its exit status, and what it leaves on disk."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import DEMO, ROOT, journeyman, small_disk

GOOD = [{"text": f"request {i}", "label": "banking"} for i in range(200)]


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(output: Path, source: Path, *more: str) -> subprocess.CompletedProcess[str]:
    settings = [
        f"output={output}",
        f"corpus.sources=[{source}]",
        "corpus.columns={text: text, label: label}",
        "corpus.where={}",
        "corpus.split_map={}",
        "corpus.limits={}",
        *more,
    ]
    return journeyman("prepare", str(DEMO), *(f"--set={s}" for s in settings))


def assert_one_sentence(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 1, done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("journeyman: ")
    assert done.stderr.count("\n") == 1, done.stderr


def empty(folder: Path) -> Path:
    return jsonl(folder / "empty.jsonl", [])


def without_text(folder: Path) -> Path:
    return jsonl(folder / "other.jsonl", [{"body": "hello", "label": "banking"}])


def unknown_label(folder: Path) -> Path:
    return jsonl(folder / "rows.jsonl", [*GOOD, {"text": "a taxi", "label": "taxi"}])


def corrupt_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(GOOD), folder / "rows.parquet")
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    return folder / "rows.parquet"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (empty, "the corpus is empty"),
        (without_text, "no column text; it has body, label"),
        (unknown_label, "gold label 'taxi' of 1 rows has no label words"),
        (corrupt_parquet, "not a readable Parquet file"),
    ],
)
def test_unusable_corpus_ends_in_one_sentence(tmp_path: Path, source, words: str):
    assert_one_sentence(prepare(tmp_path / "runs", source(tmp_path)), words)
    assert not (tmp_path / "runs" / "routing" / "corpus").exists()


def test_unknown_recipe_key_ends_in_one_sentence(tmp_path: Path):
    done = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", GOOD), "training.epoch=3")
    assert_one_sentence(done, "unknown key training.epoch; did you mean epochs?")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "64k") as folder:
        yield folder


def test_full_disk_ends_in_one_sentence_and_harms_nothing(tiny_disk: Path, tmp_path: Path):
    small = jsonl(tmp_path / "small.jsonl", GOOD)
    assert prepare(tiny_disk, small).returncode == 0
    before = (tiny_disk / "routing" / "corpus" / "manifest.json").read_bytes()
    many = [{"text": f"{i * 7919 % 99991} {i}", "label": "banking"} for i in range(20000)]
    done = prepare(tiny_disk, jsonl(tmp_path / "large.jsonl", many))
    assert_one_sentence(done, "the disk is full")
    assert (tiny_disk / "routing" / "corpus" / "manifest.json").read_bytes() == before
    assert [p.name for p in (tiny_disk / "routing").iterdir() if p.name.endswith(".tmp")] == []


def test_a_step_before_its_inputs_says_what_to_run(tmp_path: Path):
    done = journeyman("label", str(DEMO), f"--set=output={tmp_path}")
    assert_one_sentence(done, "run journeyman prepare first")


def test_a_second_command_on_the_same_run_is_refused(tmp_path: Path):
    source = jsonl(tmp_path / "rows.jsonl", GOOD)
    (tmp_path / "routing").mkdir()
    with (tmp_path / "routing" / ".lock").open("w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        assert_one_sentence(prepare(tmp_path, source), "is working there")


def test_recipe_commands_show_schema_and_check():
    shown = journeyman("recipe", "show", str(DEMO), "--set", "training.epochs=9")
    assert shown.returncode == 0
    assert "epochs: 9" in shown.stdout
    schema = json.loads(journeyman("recipe", "schema").stdout)
    assert "alpha" in schema["$defs"]["Certify"]["properties"]
    checked = journeyman("recipe", "check", str(DEMO))
    assert checked.returncode == 0, checked.stderr
    assert "fine; 1 source files" in checked.stdout


def test_help_teaches_the_steps_in_order():
    text = journeyman("--help").stdout
    order = [text.index(f"    {name}") for name in ("prepare", "label", "train", "certify")]
    assert order == sorted(order)
    assert "--set training.epochs=8" in text


def test_jobs_run_without_an_installed_package():
    done = subprocess.run(
        [sys.executable, "-I", "jobs/prepare.py", "none.yaml"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert_one_sentence(done, "none.yaml: the recipe cannot be read")
