"""Traces of requests, by OpenTelemetry: who answered, and where the time went.

Ray Serve makes the spans of a request's way (ingress, teacher) where ``tracing_config`` of
serve/cascade.yaml says so; ours is the one of what the cascade decided. Texts are in none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace

from journeyman.cascade.answering import Answers

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_tracer = trace.get_tracer("journeyman")


def otlp() -> list[SpanProcessor]:
    """For ``tracing_config.exporter_import_path``: to where OTEL_EXPORTER_OTLP_ENDPOINT says."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


class Span:
    """Of one request's texts."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def answered(self, answers: Answers) -> None:
        by_whom = Counter(decision.answered_by for decision in answers.decisions)
        for who in ("student", "teacher"):
            self._span.set_attribute(f"journeyman.answered_by.{who}", by_whom[who])
        self._span.set_attribute("journeyman.teacher_tokens", answers.teacher_prompt_tokens)


@contextmanager
def answering(bundle: str, n_texts: int, asked: str) -> Iterator[Span]:
    """A span around the cascade's work on a request; a refusal is noted in it, and goes on."""
    attributes: dict[str, str | int] = {
        "journeyman.bundle": bundle,
        "journeyman.texts": n_texts,
        "journeyman.asked": asked,
    }
    with _tracer.start_as_current_span("cascade.answer", attributes=attributes) as span:
        yield Span(span)
