"""What is measured of a running cascade, against a small server whose teacher is slow."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from journeyman import traffic
from journeyman.errors import ClusterError

KEY = "jm-only-this-one"
TEXTS = [f"text {i}" for i in range(40)]


class Cascade(BaseHTTPRequestHandler):
    """Answers in time where the teacher is asked for so few rows at once."""

    in_time: int
    asked: list[tuple[str, int]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        who, given = body.get("model", "cascade"), body["input"]
        n_rows = len(given) if isinstance(given, list) else 1
        self.asked.append((who, n_rows))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        late = who == "teacher" and n_rows > self.in_time
        answer = (
            {"error": {"code": "deadline_passed"}}
            if late
            else {"results": [{"answered_by": "student", "label": "a"}] * n_rows}
        )
        content = json.dumps(answer).encode()
        self.send_response(504 if late else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(in_time: int) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    of = type("Of", (Cascade,), {"in_time": in_time, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), of)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", of.asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("in_time", "batch"), [(1000, 32), (10, 8), (1, 1)])
def test_a_teacher_too_slow_for_large_requests_is_measured_in_smaller_ones(in_time, batch):
    with serving(in_time) as (url, asked):
        found = traffic.send(url, KEY, TEXTS, 36, lambda _: None)
    assert max(n for who, n in asked if who == "teacher" and n <= in_time) == batch
    student = [n for who, n in asked if who == "student"][2:]  # behind the pass that warms it up
    assert max(student) == batch and sum(student) == 5 * 36
    assert found.requests == len(TEXTS) and found.teacher_rows_per_s > 0


def test_a_teacher_too_slow_for_one_row_is_said():
    with (
        serving(0) as (url, _),
        pytest.raises(ClusterError, match=rf"{url}/v1/classify answered 504: .*deadline_passed"),
    ):
        traffic.send(url, KEY, TEXTS, 36, lambda _: None)
