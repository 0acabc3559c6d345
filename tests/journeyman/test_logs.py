"""Lines of JSON that say of which run and shard they are."""

import json
from pathlib import Path

from journeyman.logs import Log


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_says_of_which_run_it_is(tmp_path: Path) -> None:
    log = Log(tmp_path / "journeyman", "label-1", run="demo", recipe="ab")
    log.info("shard committed", shard="part-00000.parquet", rows=3)
    log.error("shard failed", shard="part-00001.parquet", error="dünn\nund breit")
    first, second = lines(tmp_path / "journeyman" / "label-1.log")
    assert first.pop("time").endswith("+00:00") and second.pop("time")
    always = {"run": "demo", "recipe": "ab"}
    assert first == {"level": "INFO", "event": "shard committed", **always,
                     "shard": "part-00000.parquet", "rows": 3}  # fmt: skip
    assert second == {"level": "ERROR", "event": "shard failed", **always,
                      "shard": "part-00001.parquet", "error": "dünn\nund breit"}  # fmt: skip


def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("")
    for log in (Log(None, "a"), Log(tmp_path / "file" / "below", "b")):
        log.info("replica started")
        log.error("replica did not start", error="no engine")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert capfd.readouterr() == ("", "")
