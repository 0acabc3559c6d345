"""What commits, runs and corpora need of S3, by a server that is not ours: moto's."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from journeyman import cli, corpus, folder, object_store, recipe
from journeyman.errors import ClusterError
from journeyman.folder import Folder
from journeyman.labels import dataset
from journeyman.mirror import Mirror
from journeyman.student.checkpoints import Checkpoints
from tests.journeyman.labels import synthetic
from tests.journeyman.labels.object_server import moto
from tests.journeyman.student.test_checkpoints import bytes_of, content, state


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched, moto(patched) as url:
        yield url


def test_listings_go_on_behind_a_page(bucket: str):
    shelf = Folder(f"{bucket}/many")
    names = {f"commits/part-{i:05d}.json" for i in range(1100)}
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda name: shelf.put(name, b"{}"), names))
    shelf.put("commitments", b"")
    assert {item.name for item in shelf.walk("commits")} == names
    shelf.delete("commits/part-00000.json")
    shelf.delete("commits/part-00000.json")
    assert not shelf.has("commits/part-00000.json") and shelf.has("commits/part-00001.json")


def test_labels_are_read_as_they_were_written(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = synthetic.settings("classes")
    rows = [(synthetic.row(f"text {i}", "train"), synthetic.classes(0.25, 0.75)) for i in range(9)]
    parts = [rows[:4], rows[4:]]
    here = synthetic.write_dataset(tmp_path / "run", asked, parts)
    for file in filter(Path.is_file, (tmp_path / "run").rglob("*")):
        Folder(f"{bucket}/run").put_file(str(file.relative_to(tmp_path / "run")), file)
    assert cli.main(["labels", "show", f"{bucket}/run"]) == 0
    assert "text 3" in capsys.readouterr().out  # the corpus is found beside the labels
    assert cli.main(["labels", "stats", f"{bucket}/nothing"]) == 1
    assert "there is no label dataset" in capsys.readouterr().err
    there = dataset.read_classes(f"{bucket}/run/labels", f"{bucket}/run/corpus")
    assert there.texts == dataset.read_classes(here.where, tmp_path / "run" / "corpus").texts
    assert len(there) == 9


def test_a_run_has_its_corpus_there(bucket: str, tmp_path: Path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(30)))
    Folder(f"{bucket}/sources").put_file("rows.jsonl", source)
    asked = synthetic.recipe_of("logits").model_dump(mode="json")
    asked["corpus"] |= {"sources": [f"{bucket}/sources/*.jsonl"], "columns": {"text": "text"}}
    asked["corpus"]["shares"] = {"train": 1}
    corpus.prepare(recipe.parse(asked), tmp_path / "corpus")
    Mirror(local=tmp_path / "corpus", url=f"{bucket}/prepared").push()
    shards = corpus.read_manifest(f"{bucket}/prepared")["shards"]
    read = [row["text"] for s in shards
            for row in corpus.read_shard(f"{bucket}/prepared", s["name"]).to_pylist()]  # fmt: skip
    assert sorted(read) == sorted(f"row {i}" for i in range(30))


def test_large_files_and_checkpoints_come_back_whole(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder, "_PIECE", 5 << 20)
    large = os.urandom((12 << 20) + 7)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "large").write_bytes(large)
    url = f"{bucket}/mirror"
    Mirror(local=tmp_path / "one", url=url).push()
    assert Mirror(local=tmp_path / "other", url=url).pull()
    assert (tmp_path / "other" / "large").read_bytes() == large

    work = f"{bucket}/.student-work"
    worker = Checkpoints.claim(Mirror(local=tmp_path / "worker", url=work))
    for step in (1, 2):
        worker.save(state(step), content(), bytes_of(8))
    elsewhere = Checkpoints(Mirror(local=tmp_path / "elsewhere", url=work), worker.attempt)
    assert elsewhere.latest() == state(2)
    assert (elsewhere.model(2) / "config.json").read_text() == '{"layers": 2}'
    Mirror(local=tmp_path / "worker", url=work).remove()
    assert elsewhere.latest() is None


def test_a_bucket_that_is_not_there_gets_a_sentence(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(object_store, "_PATIENCE_S", 0.2)
    nowhere = Folder("s3://no-such-bucket/labels")
    with pytest.raises(ClusterError, match="cannot be written: there is no such bucket"):
        nowhere.create("commits/part-00000.json", b"{}")
    with pytest.raises(ClusterError, match=r"cannot be listed .*404 Not Found"):
        list(nowhere.walk("commits"))
    nowhere.delete("commits/part-00000.json")
    assert not nowhere.has("commits/part-00000.json")
