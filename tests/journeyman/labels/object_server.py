"""As much of S3's HTTP interface as a label dataset needs, conditional puts included."""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import pytest


class ObjectServer(ThreadingHTTPServer):
    """objects: content by bucket/key. fail_after: key endings whose next put is carried out, and
    then answered with this status (0: not at all)."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.objects: dict[str, bytes] = {}
        self.fail_after: dict[str, int] = {}
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A connection that was dropped on purpose is nobody's business."""


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        key = self._key()
        with self.server.lock:
            if self.headers.get("If-None-Match") == "*" and key in self.server.objects:
                return self._answer(412)
            self.server.objects[key] = content
            ending = next((e for e in self.server.fail_after if key.endswith(e)), None)
            status = 200 if ending is None else self.server.fail_after.pop(ending)
        if not status:
            self.close_connection = True
            return None
        return self._answer(status, etag=_etag(content))

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            return self._answer(200, self._listing(query.get("prefix", [""])[0]))
        content = self.server.objects.get(self._key())
        if content is None:
            return self._answer(404)
        return self._answer(200, content, _etag(content))

    def do_POST(self) -> None:
        """Delete many: the only form in which obstore's client deletes."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", body)
        with self.server.lock:
            for key in keys:
                self.server.objects.pop(f"{self._key().rstrip('/')}/{unescape(key)}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _listing(self, prefix: str) -> bytes:
        bucket = self._key().rstrip("/")
        items = "".join(
            f"<Contents><Key>{escape(key.removeprefix(bucket + '/'))}</Key>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{_etag(content)}</ETag><Size>{len(content)}</Size></Contents>"
            for key, content in sorted(self.server.objects.items())
            if key.startswith(f"{bucket}/{prefix}")
        )
        return (
            f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()
        )

    def _answer(self, status: int, content: bytes = b"", etag: str = '""') -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectServer, str]]:
    """The server, and an s3:// URL that leads to it while the environment is patched."""
    server = ObjectServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_REGION", "nowhere")
    try:
        # Of each URL one client is kept, so each server has a URL of its own.
        yield server, f"s3://bucket-{uuid.uuid4().hex}/some/labels"
    finally:
        server.shutdown()
        server.server_close()
