"""`serve deploy` on a cluster of its own: a new bundle takes over under load, feedback is kept."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from journeyman.certify.bundle import save
from tests import ray_head
from tests.conftest import ROOT
from tests.ray_head import Head, free_ports, is_up, until
from tests.serve import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def head() -> Iterator[Head]:
    with ray_head.cluster(3, cwd=ROOT) as started:
        yield started


def write_bundle(run: tiny.Run, folder: Path, n_above: int, feedback: Path) -> tuple[Path, str]:
    """A bundle whose student may answer the n surest of TEXTS."""
    threshold = float(sorted(run.scores)[-n_above - 1])
    bundle = tiny.a_bundle(run.folder, run.recipe, threshold)
    save(bundle, folder)
    settings = run.recipe.model_dump(mode="json")
    settings["cascade"]["feedback"] = {"to": str(feedback), "audit_rate": 0.2, "roll_s": 1}
    (folder / "recipe.json").write_text(json.dumps(settings))
    return folder, bundle.bundle_id


def test_a_new_bundle_takes_over_without_dropping_a_request(
    head: Head, run: tiny.Run, tmp_path: Path
):
    first, first_id = write_bundle(run, run.folder / "first", 10, tmp_path / "feedback")
    second, second_id = write_bundle(run, run.folder / "second", 30, tmp_path / "feedback")
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    head.deploy(tmp_path, port, first)
    until(lambda: is_up(f"{url}/readyz", 200), 300)  # until then Serve's proxy says 404

    answers: Counter[tuple[int, str]] = Counter()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                for text in tiny.TEXTS:
                    response = client.post("/v1/classify", json={"input": text})
                    answers[response.status_code, response.json().get("bundle", "")] += 1

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        other = {"bundle": str(second), "candidate": {"bundle": str(first)}}
        head.deploy(tmp_path, port, first, other)
        until(lambda: answers[200, second_id] >= 2 * len(tiny.TEXTS), 200)
        head.deploy(tmp_path, port, first, {"bundle": str(tmp_path / "none")})
        until(lambda: figures(url)["reload_failure"], 60)
    finally:
        stop.set()
        asking.join()
    assert set(answers) == {(200, first_id), (200, second_id)}
    now = figures(url)
    assert now["bundle"] == second_id and "no policy bundle" in now["reload_failure"]

    time.sleep(3)  # the last rows are rolled
    rows = [row for path in (tmp_path / "feedback").glob("*.parquet")
            for row in pq.read_table(path).to_pylist()]  # fmt: skip
    assert {row["bundle"] for row in rows} == {first_id, second_id}
    escalated = [row for row in rows if row["escalated"]]
    assert {row["answered_by"] for row in escalated} == {"teacher"}
    audited = [row for row in rows if row["split"] == "certify"]
    assert 0 < len(audited) < sum(answers.values()) / 2
    assert {row["answered_by"] for row in audited} == {"student", "teacher"}


def figures(url: str) -> dict:
    return httpx.get(f"{url}/v1/figures", timeout=30).json()
