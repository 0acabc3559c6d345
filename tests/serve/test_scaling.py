"""As many replicas of the ingress as their students have work for; one that is lost."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from serve.scaling import BUSY, BusyStudents
from tests import ray_head
from tests.conftest import ROOT, children
from tests.ray_head import free_ports, is_up, until
from tests.serve import tiny


def wanted(busy: Mapping[str, float], target: int = 2) -> float:
    metrics = {BUSY: dict(busy)} if busy else {}
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=target)
    return BusyStudents(wanted=0.5)(context)[0]  # type: ignore[arg-type]


def test_students_are_as_busy_as_is_asked_for():
    assert wanted({"a": 0.9, "b": 0.6}) == pytest.approx(3)
    assert wanted({"a": 0.1, "b": 0.0}) == pytest.approx(0.2)  # Serve's bounds make it one
    assert wanted({}) == 2  # nobody has reported: as it is


@contextmanager
def asking(url: str, texts: list[str], n_clients: int) -> Iterator[Counter[str]]:
    """Clients that ask all the while; what became of their requests, by name."""
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                try:
                    response = client.post("/v1/classify", json={"input": texts})
                    outcomes[str(response.status_code)] += 1
                except httpx.TimeoutException:
                    outcomes["silence"] += 1
                except httpx.HTTPError:
                    outcomes["connection"] += 1

    clients = [threading.Thread(target=ask) for _ in range(n_clients)]
    for each in clients:
        each.start()
    try:
        yield outcomes
    finally:
        stop.set()
        for each in clients:
            each.join()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_busy_ingress_gets_a_second_replica_and_one_that_is_killed_takes_only_its_own_along(
    run: tiny.Run, tmp_path: Path
):
    bundle = tmp_path / "bundle"
    settings = run.recipe.model_dump(mode="json")
    settings["cascade"]["student_replicas"] = {"min": 1, "max": 2, "busy": 0.02, "idle_s": 600}
    bundle.mkdir()
    (bundle / "bundle.json").write_bytes((run.bundle_dir / "bundle.json").read_bytes())
    (bundle / "recipe.json").write_text(json.dumps(settings))
    [port] = free_ports(1)
    url, n_clients = f"http://127.0.0.1:{port}", 4

    def ingresses() -> list[psutil.Process]:
        return children("ServeReplica:cascade:Cascade")

    with ray_head.cluster(4, cwd=ROOT) as head:
        head.deploy(tmp_path, port, bundle)
        until(lambda: is_up(f"{url}/readyz", 200), 300)
        assert len(ingresses()) == 1
        with asking(url, run.accepted[:4], n_clients) as outcomes:
            until(lambda: len(ingresses()) == 2, 200)
            until(lambda: outcomes["200"] > 50, 60)
            assert set(outcomes) == {"200"}
            ingresses()[0].kill()
            until(lambda: len(ingresses()) == 2, 200)
            at_least = outcomes["200"] + 50
            until(lambda: outcomes["200"] > at_least, 60)
        lost = sum(outcomes.values()) - outcomes["200"]
        assert outcomes["silence"] == 0 and lost <= 2 * n_clients, outcomes
