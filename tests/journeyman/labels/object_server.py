"""S3 on loopback: a server of ours, which fails when told to, and moto's, which is not ours."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import pytest


@dataclass
class Faults:
    """Of requests at random: share of them fail, in one of the ways that S3 has."""

    share: float
    random: random.Random
    met: Counter[str] = field(default_factory=Counter)  # how often, by way

    def draw(self) -> str | None:
        if self.random.random() >= self.share:
            return None
        way = self.random.choice(("error", "slow down", "cut before", "cut after", "cut within"))
        self.met[way] += 1
        return way


class ObjectServer(ThreadingHTTPServer):
    """objects: content by bucket/key. fail_after: key endings whose next put is carried out, and
    then answered with this status (0: not at all). n_requests: by method."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.objects: dict[str, bytes] = {}
        self.written: dict[str, datetime] = {}  # when, of those that came over HTTP
        self.uploads: dict[str, dict[int, bytes]] = {}  # of large objects, by upload: the parts
        self.fail_after: dict[str, int] = {}
        self.faults: Faults | None = None
        self.n_requests: Counter[str] = Counter()
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A connection that was dropped on purpose is nobody's business."""


_LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
_PAGE = 1000  # keys of a listing, as S3 has it
_BEGUN = (
    "<InitiateMultipartUploadResult><Key>{key}</Key><UploadId>{id}</UploadId>"
    "</InitiateMultipartUploadResult>"
)
_ENDED = "<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
_SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def parse_request(self) -> bool:
        """Faults strike here, before a method's own handler: all but those that carry it out."""
        if not super().parse_request():
            return False
        with self.server.lock:
            self.server.n_requests[self.command] += 1
            self._fault = self.server.faults.draw() if self.server.faults else None
        if self._fault in (None, "cut after", "cut within"):
            return True
        if self._fault != "cut before":
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(500 if self._fault == "error" else 503, _SLOW_DOWN)
        self.close_connection = True
        return False

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        key, query = self._key(), self._query()
        with self.server.lock:
            if "uploadId" in query:
                self.server.uploads[query["uploadId"]][int(query["partNumber"])] = content
                return self._answer(200, etag=_etag(content))
            if self.headers.get("If-None-Match") == "*" and key in self.server.objects:
                return self._answer(412)
            self.server.objects[key] = content
            self.server.written[key] = datetime.now(UTC)
            ending = next((e for e in self.server.fail_after if key.endswith(e)), None)
            status = 200 if ending is None else self.server.fail_after.pop(ending)
        if not status:
            self.close_connection = True
            return None
        return self._answer(status, etag=_etag(content))

    def do_GET(self) -> None:
        query = self._query()
        if "list-type" in query:
            return self._answer(200, self._listing(query))
        content = self.server.objects.get(self._key())
        if content is None:
            return self._answer(404)
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self._answer(200, content, _etag(content))
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        within = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self._answer(206, content[first : last + 1], _etag(content), within)

    do_HEAD = do_GET  # noqa: N815 - http.server's name for it

    def do_POST(self) -> None:
        """Delete many: the only form in which obstore's client deletes; or a large object."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        query = self._query()
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.server.uploads[upload] = {}
            return self._answer(200, _BEGUN.format(key=escape(self._key()), id=upload).encode())
        if "uploadId" in query:
            with self.server.lock:
                parts = self.server.uploads[query["uploadId"]]
                content = b"".join(parts[number] for number in sorted(parts))
                self.server.objects[self._key()] = content
            return self._answer(200, _ENDED.format(etag=escape(_etag(content))).encode())
        keys = re.findall("<Key>(.*?)</Key>", body)
        with self.server.lock:
            for key in keys:
                self.server.objects.pop(f"{self._key().rstrip('/')}/{unescape(key)}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        return self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def do_DELETE(self) -> None:
        """Of an upload that its client has given up."""
        self.server.uploads.pop(self._query()["uploadId"], None)
        self._answer(204)

    def _query(self) -> dict[str, str]:
        asked = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: values[0] for name, values in asked.items()}

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _listing(self, query: dict[str, str]) -> bytes:
        """A page of what is below a prefix; with a delimiter, folders in place of their content."""
        bucket, prefix = self._key().rstrip("/"), query.get("prefix", "")
        delimiter = query.get("delimiter")
        after = max(query.get("continuation-token", ""), query.get("start-after", ""))
        with self.server.lock:
            keys = sorted(
                key.removeprefix(f"{bucket}/")
                for key in self.server.objects
                if key.startswith(f"{bucket}/{prefix}")
            )
        folders = sorted({
            prefix + key.removeprefix(prefix).split(delimiter)[0] + delimiter
            for key in keys if delimiter and delimiter in key.removeprefix(prefix)
        })  # fmt: skip
        keys = [key for key in keys if not key.startswith(tuple(folders)) and key > after]
        page, more = keys[:_PAGE], len(keys) > _PAGE
        items = "".join(map(self._item, [bucket] * len(page), page))
        items += "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders
        )
        next_page = (
            f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        )
        return (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{next_page}{items}"
            "</ListBucketResult>"
        ).encode()

    def _item(self, bucket: str, key: str) -> str:
        content = self.server.objects.get(f"{bucket}/{key}", b"")
        written = self.server.written.get(f"{bucket}/{key}", _LONG_AGO)
        return (
            f"<Contents><Key>{escape(key)}</Key>"
            f"<LastModified>{written.isoformat(timespec='milliseconds')}</LastModified>"
            f"<ETag>{_etag(content)}</ETag><Size>{len(content)}</Size></Contents>"
        )

    def _answer(
        self,
        status: int,
        content: bytes = b"",
        etag: str = '""',
        headers: dict[str, str] | None = None,
    ) -> None:
        fault, self._fault = self._fault, None
        self.close_connection |= fault is not None
        if fault == "cut after":
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "cut within" else content)

    def log_message(self, *_: object) -> None:
        pass


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectServer, str]]:
    """The server, and an s3:// URL that leads to it while the environment is patched."""
    server = ObjectServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    _lead_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    try:
        # Of each URL one client is kept, so each server has a URL of its own.
        yield server, f"s3://bucket-{uuid.uuid4().hex}/some/labels"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An s3:// URL of a server that is not ours, while the environment is patched."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    _lead_to(f"http://{host}:{port}", monkeypatch)
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=bucket)
    try:
        yield f"s3://{bucket}"
    finally:
        server.stop()


def _lead_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
