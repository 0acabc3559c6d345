"""What a shard costs the driver of a labeling run, from a thousand shards to a million.

    .venv/bin/python tests/benchmarks/scale.py --quick
    .venv/bin/python tests/benchmarks/scale.py --json scale.json      # half an hour or more

The driver's own code runs; only the replicas are simulated. They say at once that a shard is done,
and their commits are put into a store in memory, so that neither an engine nor a disk is timed:
what a store's answers take is its latency times the requests, which are counted. Of each size, in
a process of its own:

- plan:   the shards to do, of a dataset that has none;
- run:    Ray Data hands every shard to a replica, and its record comes back (two actors);
- resume: the shards to do, of a dataset that has half of them;
- finish: all commits are read, checked, summed up, compacted, and the manifest is written;
- report: a thousand replicas tell the tally what they did, once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from journeyman import cluster, recipe
from journeyman.folder import Folder
from journeyman.labels import finishing, pipeline, planning
from journeyman.labels.progress import Tally
from journeyman.labels.replica import Counts, ReplicaSpec, Work
from journeyman.labels.schema import Commit
from journeyman.labels.store import LabelStore
from journeyman.models import Model

SIZES = (1_000, 10_000, 100_000, 1_000_000)
REPLICAS = 1_000
MOST_GROWTH = 2.0
ROWS = 100  # of a shard
_WARM = 20  # shards of a first pass: what is imported and started in it is no shard's cost
MODEL = Model(reference="none", path=Path(), weights_digest="", tokenizer_digest="", size_bytes=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a thousand and ten thousand shards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--without-run", action="store_true", help="leave Ray Data out")
    options = parser.parse_args()
    if options.size:
        print(json.dumps(measure(options.size, with_run=not options.without_run)))
        return 0
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"ray {metadata.version('ray')}")  # fmt: skip
    sizes = SIZES[:2] if options.quick else SIZES
    found = {n: of_size(n, ["--without-run"] * options.without_run) for n in sizes}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return goals(found)


def of_size(n: int, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--size", str(n), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    costs = "  ".join(
        f"{phase} {told['seconds'][phase] / n * 1e6:8.1f}" for phase in told["seconds"]
    )
    print(f"{n:>9,} shards   us/shard: {costs}   {told['bytes'] / n / 1e3:6.1f} kB/shard, "
          f"{told['bytes'] / 1e9:.2f} GB   requests/shard: "
          + ", ".join(f"{name} {count / n:.3g}" for name, count in told["requests"].items())
          + f"   report {told['report_us']:.1f} us", flush=True)  # fmt: skip
    return told


def goals(found: dict[int, dict[str, Any]]) -> int:
    """Each phase's cost of a shard, at the largest size over that at the smallest."""
    short, (least, most) = 0, (min(found), max(found))
    for name in (*found[least]["seconds"], "all"):
        one, other = (cost(found[n], name) / n for n in (least, most))
        got, ok = other / one, other / one <= MOST_GROWTH
        short += not ok
        print(f"goal  scale/{name} a shard, {most:,} vs {least:,}   <= {MOST_GROWTH:.2f}   "
              f"got {got:.2f}   {'ok' if ok else 'SHORT'}")  # fmt: skip
    return 1 if short else 0


def cost(told: dict[str, Any], phase: str) -> float:
    seconds = told["seconds"]
    return sum(seconds.values()) if phase == "all" else seconds[phase]


# --- one size ---


def measure(n: int, *, with_run: bool) -> dict[str, Any]:
    """Seconds by phase, bytes that the driver grew by, requests to the store."""
    settings = simulated_recipe()
    if with_run:
        cluster.connect(settings.cluster)
    start_s = phases(_WARM, settings, with_run=with_run)["seconds"].get("run", 0.0)
    told = phases(n, settings, with_run=with_run)
    if with_run:
        told["seconds"]["run"] -= start_s
    return told | {"report_us": report_us()}


def phases(n: int, settings: recipe.Recipe, *, with_run: bool) -> dict[str, Any]:
    manifest = corpus_manifest(n)
    store = LabelStore(f"memory:///{uuid.uuid4().hex}")
    store.open(pipeline.identity(settings, MODEL, manifest["digest"]))
    store.finish({"codec": None})
    before = peak()
    seconds: dict[str, float] = {}
    requests: Counter[str] = Counter()
    with counted(requests):
        seconds["plan"], todo = timed(lambda: planning.todo(manifest, store))
        assert len(todo) == n
        if with_run:
            seconds["run"], _ = timed(lambda: run(settings, store, todo, manifest))
    held = commit(store, todo[: n // 2])
    with counted(requests):
        seconds["resume"], left = timed(lambda: planning.todo(manifest, store))
    assert len(left) == n - n // 2
    held += commit(store, left)
    with counted(requests):
        seconds["finish"], finished = timed(
            lambda: finishing.finish(store, settings, settings.teacher, manifest)
        )
    assert finished["totals"]["rows"] == n * ROWS
    return {"seconds": seconds, "bytes": peak() - before - held, "requests": requests}


def simulated_recipe() -> recipe.Recipe:
    return recipe.parse(
        {
            "name": "scale",
            "corpus": {"sources": ["none"], "rows_per_shard": ROWS},
            "teacher": {"model": "none", "max_model_len": 64},
            "labels": {"kind": "logits", "k": 4},
            "cluster": {"replicas": {"min": 2, "max": 2}, "cpus_per_replica": 0.5},
        }
    )


def corpus_manifest(n: int) -> dict[str, Any]:
    shards = [{"name": f"part-{i:05d}.parquet", "rows": ROWS} for i in range(n)]
    return {"rows": n * ROWS, "shards": shards, "digest": "none", "splits": {"train": n * ROWS}}


class Simulated:
    """What stands in for pipeline's actor: every shard is done at once."""

    def __init__(self, spec: ReplicaSpec, tally: Any) -> None:
        pass

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        shards = [pipeline._work(str(work)).shard for work in batch["work"]]
        records = [json.dumps(dataclasses.asdict(commit_of(shard))) for shard in shards]
        return {"commit": records, "error": [""] * len(records)}


def run(
    settings: recipe.Recipe, store: LabelStore, todo: list[str], manifest: dict[str, Any]
) -> None:
    pipeline._ShardLabeler = Simulated  # type: ignore[assignment,misc]
    spec = ReplicaSpec(recipe=settings, teacher=settings.teacher, model=MODEL, corpus_dir=Path(),
                       labels=store.where, identity={})  # fmt: skip
    work = [Work(shard=shard) for shard in todo]
    pipeline._Run(spec, work, manifest, lambda _: None).run()


def commit_of(shard: str) -> Commit:
    counts = dict.fromkeys(
        ("generation", "quarantined", "filtered", "truncated", "copied", "cached_tokens",
         "output_tokens", "engine_restarts"), 0,
    )  # fmt: skip
    return Commit(
        shard=shard, data=f"shards/{Path(shard).stem}.0123456789ab.parquet", quarantine=None,
        filtered_file=None, sha256="0" * 64, rows=ROWS, ok=ROWS, prompt_tokens=25 * ROWS,
        seconds=60.0, replica_seconds=60.0, bytes=1 << 20, **counts,
    )  # fmt: skip


def commit(store: LabelStore, shards: list[str]) -> int:
    """What replicas do, at no cost of the driver's; returns by how much the store grew."""
    before = peak()
    for shard in shards:
        store._commits.create(commit_of(shard))
    return peak() - before


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class counted:  # noqa: N801 - reads as a statement
    """Requests that a store behind HTTP would see: a page of a listing has 1,000 names."""

    def __init__(self, requests: Counter[str]) -> None:
        self._requests = requests
        self._own = {name: getattr(Folder, name) for name in ("get", "_put", "walk", "delete")}

    def __enter__(self) -> None:
        for name, own in self._own.items():
            setattr(Folder, name, self._counting(name, own))

    def __exit__(self, *_: object) -> None:
        for name, own in self._own.items():
            setattr(Folder, name, own)

    def _counting(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        requests = self._requests

        def walk(folder: Folder, prefix: str) -> Any:
            requests["list"] += 1
            for i, listed in enumerate(own(folder, prefix), 1):
                requests["list"] += i % 1000 == 0
                yield listed

        def other(folder: Folder, *arguments: Any) -> Any:
            requests[name.strip("_")] += 1
            return own(folder, *arguments)

        return walk if name == "walk" else other


def report_us() -> float:
    """A replica's report to the tally, while a thousand of them report."""
    tally = Tally("scale")
    counts = Counts(rows=10, prompt_tokens=250)
    seconds, _ = timed(lambda: [tally.add(str(i), counts) for i in range(REPLICAS)])
    tally.total()
    return seconds / REPLICAS * 1e6


if __name__ == "__main__":
    os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.exit(main())
