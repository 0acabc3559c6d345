"""`serve deploy` on a cluster of its own: a new bundle takes over under load, feedback is kept."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from journeyman.certify.bundle import save
from tests.serve import tiny

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass(frozen=True)
class Head:
    """A Ray cluster of one node, with Serve's address."""

    dashboard: int
    http: int
    environment: dict[str, str]

    def deploy(self, folder: Path, bundle: Path, user_config: dict) -> None:
        application = {
            "name": "cascade",
            "route_prefix": "/",
            "import_path": "serve.app:app",
            "args": {"bundle": str(bundle)},
            "runtime_env": {"env_vars": {"PYTHONPATH": ".:platform"}},
            "deployments": [{"name": "Cascade", "user_config": user_config}],
        }
        http = {"host": "127.0.0.1", "port": self.http}
        config = {"proxy_location": "EveryNode", "http_options": http,
                  "applications": [application]}  # fmt: skip
        path = folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        subprocess.run(
            [BIN / "serve", "deploy", str(path)],
            cwd=ROOT, env=self.environment, check=True, capture_output=True, timeout=200,
        )  # fmt: skip


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    ports = free_ports(5)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    http = ports[-1]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "PYTHONPATH": ".:platform",
        "RAY_AUTH_MODE": "token",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{ports[1]}",
    }
    temporary = Path(f"/tmp/jm-{os.getpid()}")  # Ray's sockets allow short paths only
    process = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus=3", "--disable-usage-stats",
         "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={temporary}",
         *(f"--{name}={port}" for name, port in zip(names, ports, strict=False))],
        cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: is_up(f"http://127.0.0.1:{ports[1]}/api/version"), 120)
        yield Head(dashboard=ports[1], http=http, environment=environment)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def is_up(url: str, *statuses: int) -> bool:
    """Whether it answers, with one of these if there are any."""
    try:
        found = httpx.get(url, timeout=5).status_code
        return found in statuses if statuses else found < 500
    except httpx.HTTPError:
        return False


def until(holds, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.5)


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
    url = f"http://127.0.0.1:{head.http}"
    head.deploy(tmp_path, first, {})
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
        head.deploy(tmp_path, first, {"bundle": str(second), "candidate": {"bundle": str(first)}})
        until(lambda: answers[200, second_id] >= 2 * len(tiny.TEXTS), 200)
        head.deploy(tmp_path, first, {"bundle": str(tmp_path / "none")})
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
