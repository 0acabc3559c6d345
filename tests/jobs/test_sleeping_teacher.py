"""A teacher that sleeps while nothing is escalated: from none to one and back, for real."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serve.running import running
from tests.conftest import children
from tests.serve import tiny

IDLE_S = 6.0


def asleep() -> bool:
    return not children("ServeReplica:cascade:Teacher")


def until(true: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow  # starts an engine twice
@pytest.mark.timeout(900)
def test_a_teacher_sleeps_is_woken_by_an_escalation_and_sleeps_again(
    ray_cluster: None, tmp_path: Path
):
    run = tiny.write_run(tmp_path)
    settings = json.loads((run.bundle_dir / "recipe.json").read_text())
    settings["cascade"]["teacher_replicas"] = {"min": 0, "max": 1, "idle_s": IDLE_S}
    settings["cascade"]["breaker"] = {"failures": 1}  # to be woken is no failure
    (run.bundle_dir / "recipe.json").write_text(json.dumps(settings))
    with running(run.bundle_dir) as url, httpx.Client(base_url=url, timeout=60) as client:

        def classify(text: str) -> httpx.Response:
            return client.post("/v1/classify", json={"input": text})

        assert asleep() and client.get("/readyz").status_code == 200
        for text in run.accepted:
            assert classify(text).json()["results"][0]["answered_by"] == "student"
        time.sleep(2 * IDLE_S)
        assert asleep(), "the student's answers wake nobody"
        for _ in range(2):
            refused = classify(run.escalated[0])
            assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
            assert refused.json()["error"]["code"] == "teacher_starting"
            assert classify(run.accepted[0]).status_code == 200
            until(lambda: classify(run.escalated[0]).status_code == 200, 300)
            answered = classify(run.escalated[0]).json()["results"][0]
            assert answered["answered_by"] == "teacher"
            assert not client.get("/v1/figures").json()["breaker_open"]
            until(asleep, 60)
