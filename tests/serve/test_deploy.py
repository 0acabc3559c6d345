"""`serve deploy` on a cluster of its own: a new bundle takes over under load, feedback is kept."""

import gzip
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from journeyman.cascade import rollout
from journeyman.certify.bundle import save
from tests import ray_head
from tests.conftest import ROOT, children
from tests.ray_head import Head, free_ports, is_up, until
from tests.serve import tiny
from tests.serve.test_app import teachers_engines

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
        planned = rollout.plan(head.deployed(tmp_path), str(second), lambda _: True)
        head.serve_deploy(tmp_path, planned.shadow)
        until(lambda: decided(figures(url)["candidate"]) >= 2 * len(tiny.TEXTS), 200)
        tried = figures(url)["candidate"]
        assert (tried["bundle"], tried["mode"]) == (second_id, "shadow")
        # It decides by its own threshold, and nobody sees its answers.
        assert tried["totals"]["student"] / decided(tried) == pytest.approx(30 / 40, abs=0.1)
        assert set(answers) == {(200, first_id)}
        head.serve_deploy(tmp_path, planned.promote)
        until(lambda: answers[200, second_id] >= 2 * len(tiny.TEXTS), 200)
        canary = {"bundle": str(first), "mode": "canary", "share": 0.5}
        head.deploy(tmp_path, port, first, {"bundle": str(second), "candidate": canary})
        seen = answers[200, first_id]
        until(lambda: answers[200, first_id] >= seen + len(tiny.TEXTS), 200)
        assert figures(url)["bundle"] == second_id
        head.deploy(tmp_path, port, first, {"bundle": str(tmp_path / "none")})
        until(lambda: figures(url)["reload_failure"], 60)
    finally:
        stop.set()
        asking.join()
    assert set(answers) == {(200, first_id), (200, second_id)}
    now = figures(url)
    assert now["bundle"] == second_id and "no policy bundle" in now["reload_failure"]

    bare = head.deployed(tmp_path)
    del bare["applications"][0]["deployments"]  # user_config and all
    head.serve_deploy(tmp_path, bare)
    until(lambda: figures(url)["bundle"] == first_id, 200)

    time.sleep(3)  # the last rows are rolled
    rows = [row for path in (tmp_path / "feedback").glob("*.parquet")
            for row in pq.read_table(path).to_pylist()]  # fmt: skip
    assert {row["bundle"] for row in rows} == {first_id, second_id}
    escalated = [row for row in rows if row["escalated"]]
    assert {row["answered_by"] for row in escalated} == {"teacher"}
    audited = [row for row in rows if row["split"] == "certify"]
    assert 0 < len(audited) < sum(answers.values()) / 2
    assert {row["answered_by"] for row in audited} == {"student", "teacher"}


def test_a_replica_that_is_replaced_answers_what_it_has_begun(
    head: Head, run: tiny.Run, tmp_path: Path
):
    bundle, _ = write_bundle(run, run.folder / "drained", 10, tmp_path / "feedback")
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    head.deploy(tmp_path, port, bundle)
    until(lambda: is_up(f"{url}/readyz", 200), 300)
    [engine], [old] = teachers_engines(), children("ServeReplica:cascade:Cascade")

    engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            httpx.post, f"{url}/v1/classify", json={"input": run.escalated[0]}, timeout=60
        )
        until(lambda: figures(url)["waiting"] == 1, 20)
        head.deploy(tmp_path, port, bundle, options={"ray_actor_options": {"num_cpus": 0.5}})
        until(lambda: "STOPPING" in head.replica_states("Cascade"), 20)
        time.sleep(2)
        assert not asked.done() and old.is_running()
        engine.resume()
        answer = asked.result()

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-journeyman-answered-by"] == "teacher"
    until(lambda: not old.is_running() and is_up(f"{url}/readyz", 200), 120)


def decided(tried: dict | None) -> int:
    """Texts that a candidate has decided on."""
    return tried["totals"]["student"] + tried["totals"]["teacher"] if tried else 0


def figures(url: str) -> dict:
    return httpx.get(f"{url}/v1/figures", timeout=30).json()


class Collector(ThreadingHTTPServer):
    """What OpenTelemetry's exporters send; spans: by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.spans: dict[str, list[Any]] = defaultdict(list)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class _Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for of_scope in of_resource.scope_spans:
                for span in of_scope.spans:
                    self.server.spans[span.name].append(span)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_request_is_traced_from_the_ingress_to_the_teacher(run: tiny.Run, tmp_path: Path):
    collector, [port] = Collector(), free_ports(1)
    bundle, bundle_id = write_bundle(run, run.folder / "traced", 10, tmp_path / "feedback")
    tracing = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",  # ms
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
    }
    url = f"http://127.0.0.1:{port}"
    with ray_head.cluster(3, cwd=ROOT, **tracing) as head:
        head.deploy(tmp_path, port, bundle, tracing_config={
            "enabled": True, "exporter_import_path": "serve.tracing:otlp", "sampling_ratio": 1.0,
        })  # fmt: skip
        until(lambda: is_up(f"{url}/readyz", 200), 300)
        asked = {"input": list(tiny.TEXTS)}
        httpx.post(f"{url}/v1/classify", json=asked, timeout=60).raise_for_status()
        until(lambda: collector.spans["cascade.answer"], 30)
        time.sleep(2)  # of the other processes
    [ours] = collector.spans["cascade.answer"]
    said = {a.key: a.value.string_value or a.value.int_value for a in ours.attributes}
    assert said["journeyman.bundle"] == bundle_id
    assert said["journeyman.texts"] == len(tiny.TEXTS)
    assert said["journeyman.answered_by.student"] == 10
    assert said["journeyman.answered_by.teacher"] == len(tiny.TEXTS) - 10
    every = [span for spans in collector.spans.values() for span in spans]
    by_name = {span.name: span for span in every if span.trace_id == ours.trace_id}
    assert ours.parent_span_id == by_name["replica_handle_request Cascade __call__"].span_id
    to_teacher = by_name["route_to_replica Teacher label"]
    assert to_teacher.parent_span_id == ours.span_id
    assert by_name["replica_handle_request Teacher label"].parent_span_id == to_teacher.span_id
