"""The cloud's notice, from a metadata service on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from journeyman import spot


class Metadata(ThreadingHTTPServer):
    """As AWS (IMDSv2) and Google Cloud answer; taken_at: when the node goes, None if it stays."""

    taken_at: datetime | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class _Requests(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        asked = "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._answer(200 if asked and self.path == "/latest/api/token" else 400, "the token")

    def do_GET(self) -> None:
        taken_at = self.server.taken_at
        if self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers["Metadata-Flavor"] == "Google"
            return self._answer(200 if known else 403, str(taken_at is not None).upper())
        if self.headers["X-aws-ec2-metadata-token"] != "the token":
            return self._answer(401)
        if self.path != "/latest/meta-data/spot/instance-action" or taken_at is None:
            return self._answer(404)
        at = taken_at.strftime("%Y-%m-%dT%H:%M:%SZ")
        return self._answer(200, f'{{"action": "terminate", "time": "{at}"}}')

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    server = Metadata()
    here = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{here}")
    monkeypatch.setenv("GCE_METADATA_HOST", here)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("cloud", "wanted"), [("aws", 120), ("gcp", 30)])
def test_a_notice_says_how_long_there_is(metadata: Metadata, cloud: spot.Cloud, wanted: float):
    with httpx.Client() as client:
        assert spot.seconds_left(cloud, client) is None
        metadata.taken_at = datetime.now(UTC) + timedelta(seconds=120)
        left = spot.seconds_left(cloud, client)
        assert left is not None and wanted - 2 <= left <= wanted
        metadata.taken_at = datetime.now(UTC) - timedelta(seconds=5)
        if cloud == "aws":
            assert spot.seconds_left(cloud, client) == 0


def test_a_service_that_does_not_answer_is_an_error_of_its_own(metadata: Metadata):
    metadata.shutdown()
    metadata.server_close()
    with httpx.Client() as client, pytest.raises(httpx.HTTPError):
        spot.seconds_left("aws", client)


def test_a_notice_is_given_until_the_node_should_have_gone(metadata: Metadata, monkeypatch):
    told: list[float] = []
    monkeypatch.setattr(spot, "_drain", told.append)
    monkeypatch.setattr(spot, "_POLL_S", 0.05)
    monkeypatch.setattr(spot, "_LATE_S", 0.3)
    notice = spot.Notice("aws")
    assert not notice.given
    metadata.taken_at = datetime.now(UTC) + timedelta(seconds=2)
    deadline = time.monotonic() + 10
    while not told:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert 0 < told[0] <= 2
    began = time.monotonic()
    while notice.given:
        time.sleep(0.01)
    assert time.monotonic() - began >= told[0]  # and some time over, in which it might go
