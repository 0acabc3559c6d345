"""What a labeling run costs its driver: by shards, by replicas, and in requests to the store.

    .venv/bin/python tests/benchmarks/scale.py --quick
    .venv/bin/python tests/benchmarks/scale.py --json scale.json      # half an hour or more

The driver's own code runs; only replicas are simulated.

Shards, of each size in a process of its own. Commits are put into a store in memory, so that no
disk is timed: what a store's answers take is its latency times the requests.
- plan:   the shards to do, of a dataset that has none;
- run:    Ray Data hands every shard to one of two replicas, which says at once that it is done;
- resume: the shards to do, of a dataset that has half of them;
- finish: all commits are read, checked, summed up, compacted, and the manifest is written.

Replicas, all on this machine: each an actor of Ray, as many as there is memory for (--replicas);
and up to a thousand that are actors to Ray Data in the driver and share eight processes (--hosted).
- handing out: as above, in microseconds of the clock, of the driver, and of what else is on its
  node. The clock's are of the machine, whose cores the replicas share with the driver: a limit
  from above. What the driver itself takes is what a cluster's would;
- at work: shares of a processor while every replica is in a shard, reports, and is not done.
  Ray's control store has as many actors as there are processes: a line through its shares of the
  real actors is drawn out to a thousand.

Reports of a thousand replicas to the tally's actor, from other processes, as often as a busy
replica makes them; and requests to the store, of real replicas whose teacher is a column.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import scale_replicas
import scale_requests
from scale_replicas import MODEL, ROWS, commit_of, manifest
from scale_requests import counted

from journeyman.labels import finishing, pipeline, planning
from journeyman.labels.store import LabelStore

SIZES = (1_000, 10_000, 100_000, 1_000_000)
REPLICAS = (2, 20, 60)
ALL = 1_000
HOSTED = (2, 60, ALL)
_ENOUGH = 50  # replicas at least, whose figures are
MOST_GROWTH = 2.0
MOST_CORES = 0.5  # of a processor, by what is one process of ours however many replicas there are
MOST_OF_CONTROL = 1.0  # by Ray's control store, which has a core of the head's to itself
REQUESTS = 9  # of a labeled shard, the driver's at the end included
_TOLD = "told: "  # before the line that is for the process above, among what Ray says
_TIMES = 3  # that planning is timed
_WINDOWS, _REPORTERS = 3, 2  # in which the tally is watched; processes that report to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """blocks, per_block: of Ray Data, that are handed out to many replicas, and how many shards are
    in each; per_hosted_block: fewer, for a thousand replicas have twenty times as many blocks;
    slow_s: they are at work; loads: of the tally, as shares of what it has to bear; window_s: of
    each; apart: each measurement in a process of its own, with a Ray of its own."""

    sizes: Sequence[int] = SIZES
    replicas: Sequence[int] = REPLICAS
    hosted: Sequence[int] = HOSTED
    blocks: int = 1_000
    per_block: int = 10
    per_hosted_block: int = 2
    slow_s: float = 15.0
    loads: Sequence[float] = (1, 5)
    window_s: float = 10.0
    apart: bool = True


QUICK = Plan(
    sizes=(200, 800),
    replicas=(4,),
    hosted=(40,),
    blocks=300,
    per_block=1,
    per_hosted_block=1,
    slow_s=1.5,
    loads=(1,),
    window_s=1.0,
    apart=False,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shards, few replicas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument("--sizes", type=int, nargs="*", metavar="N", help="shards, of each run")
    parser.add_argument("--replicas", type=int, nargs="*", metavar="N", help="of each run")
    parser.add_argument("--hosted", type=int, nargs="*", metavar="N", help="of each run")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.part:
        part, argument = options.part
        print(_TOLD + json.dumps(here(part, **json.loads(argument))))
        return 0
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"ray {metadata.version('ray')}")  # fmt: skip
    given = {
        k: v for k in ("sizes", "replicas", "hosted") if (v := getattr(options, k)) is not None
    }
    found = measured(replace(QUICK if options.quick else Plan(), **given))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return goals(found)


def measured(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {"requests": scale_requests.of_a_shard()}
    show_requests(found["requests"])
    found["reports_per_s"] = scale_requests.reports_per_s(ALL)
    print(f"one of {ALL:,} busy replicas reports {found['reports_per_s']:.2f} times a second",
          flush=True)  # fmt: skip
    part = in_a_process if plan.apart else here
    found["sizes"] = {n: shown_size(part("size", n=n)) for n in plan.sizes}
    for kind, numbers, per_block in (
        ("replicas", plan.replicas, plan.per_block),
        ("hosted", plan.hosted, plan.per_hosted_block),
    ):
        found[kind] = {}
        for n in numbers:
            told = part("replicas", n=n, n_blocks=plan.blocks, per_block=per_block,
                        slow_s=plan.slow_s, in_hosts=kind == "hosted")  # fmt: skip
            found[kind][n] = shown_replicas(n, kind, told)
    found["tally"] = {}
    for load in plan.loads:
        told = part("tally", per_s=load * found["reports_per_s"], window_s=plan.window_s)
        found["tally"][load] = shown_tally(told)
    return found


def here(name: str, **arguments: Any) -> Any:
    return PARTS[name](**arguments)


def in_a_process(name: str, **arguments: Any) -> Any:
    command = [sys.executable, __file__, "--part", name, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (told,) = (line for line in done.stdout.splitlines() if line.startswith(_TOLD))
    return json.loads(told.removeprefix(_TOLD))


# --- what is printed ---


def show_requests(requests: dict[str, dict[str, float]]) -> None:
    each = (
        f"{step} " + " ".join(f"{n:g} {method}" for method, n in counts.items())
        for step, counts in requests.items()
    )
    print("requests a shard:  " + ",  ".join(each), flush=True)


def shown_size(told: dict[str, Any]) -> dict[str, Any]:
    n, seconds = told["shards"], told["seconds"]
    costs = "  ".join(f"{phase} {seconds[phase] / n * 1e6:8.1f}" for phase in seconds)
    print(f"{n:>9,} shards   us/shard: {costs}  (the driver's own of a run "
          f"{told['driver_s'] / n * 1e6:.0f})   {told['bytes'] / n / 1e3:6.1f} kB/shard, "
          f"{told['bytes'] / 1e9:.2f} GB   driver's requests/shard: "
          + ", ".join(f"{method} {count / n:.3g}" for method, count in told["requests"].items()),
          flush=True)  # fmt: skip
    return told


def shown_replicas(n: int, kind: str, told: dict[str, Any]) -> dict[str, Any]:
    us = "  ".join(f"{who} {spread(thirds)}" for who, thirds in told["us"].items())
    cores = "  ".join(f"{who} {share:.3f}" for who, share in told["cores"].items())
    print(f"{n:>5,} {kind} of {told['replica_mb']:.0f} MB, there after {told['start_s']:.0f} s   "
          f"handing out {told['shards']:,}, us/shard: {us}   at work, cores: {cores}, "
          f"{told['reports_per_s']:.0f} reports/s", flush=True)  # fmt: skip
    return told


def shown_tally(windows: list[dict[str, float]]) -> list[dict[str, float]]:
    figures = {name: spread([window[name] for window in windows], 3) for name in windows[0]}
    print(f"tally of {ALL:,} replicas   {figures['per_s']} reports/s, {figures['us']} us each, "
          f"{figures['cores']} cores, the last is counted after {figures['late_s']} s",
          flush=True)  # fmt: skip
    return windows


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}g} ({low:.{digits}g}-{high:.{digits}g})"


def goals(found: dict[str, Any]) -> int:
    """Growth of a shard's cost from the smallest run to the largest; and cores at ``ALL``."""
    met = True
    if len(found["sizes"]) > 1:
        met &= size_goals(found["sizes"])
    if len(found["hosted"]) > 1:
        met &= driver_goals(found["hosted"])
    if max(found["replicas"], default=0) >= _ENOUGH:
        at_all = drawn_out({n: told["cores"]["control"] for n, told in found["replicas"].items()})
        met &= goal(f"control store's cores, {ALL:,} replicas at work, drawn out", MOST_OF_CONTROL,
                    [at_all])  # fmt: skip
    cores = [window["cores"] for window in found["tally"][1]]
    met &= goal(f"tally's cores, {ALL:,} replicas", MOST_CORES, cores)
    labeling = [sum(found["requests"][step].values()) for step in ("label", "finish")]
    met &= goal("requests a shard", REQUESTS, [sum(labeling)])
    return 0 if met else 1


def size_goals(sizes: dict[int, dict[str, Any]]) -> bool:
    least, most = min(sizes), max(sizes)

    def cost(n: int, phase: str) -> float:
        seconds = sizes[n]["seconds"]
        return float(sum(seconds.values()) if phase == "all" else seconds[phase]) / n

    met = True
    for phase in (*sizes[least]["seconds"], "all"):
        growth = cost(most, phase) / cost(least, phase)
        met &= goal(f"{phase} a shard, {most:,} vs {least:,}", MOST_GROWTH, [growth])
    return met


def driver_goals(hosted: dict[int, dict[str, Any]]) -> bool:
    least, most = min(hosted), max(hosted)
    before = statistics.median(hosted[least]["us"]["driver"])
    growth = [us / before for us in hosted[most]["us"]["driver"]]
    met = goal(f"driver's time a shard, {most:,} vs {least:,} replicas", MOST_GROWTH, growth)
    return met & goal(f"driver's cores, {most:,} replicas at work", MOST_CORES,
                      [hosted[most]["cores"]["driver"]])  # fmt: skip


def drawn_out(of: dict[int, float]) -> float:
    """To ``ALL`` replicas, by a straight line through what was found of fewer."""
    slope, intercept = np.polyfit(list(of), list(of.values()), 1)
    return float(intercept + slope * ALL)


def goal(name: str, most: float, values: Sequence[float]) -> bool:
    got, met = statistics.median(values), statistics.median(values) <= most
    spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    print(f"goal  scale/{name}   <= {most:.2f}   got {got:.2f}{spread}   "
          f"{'ok' if met else 'SHORT'}")  # fmt: skip
    return met


# --- one size ---


def size(n: int) -> dict[str, Any]:
    """Seconds by phase, bytes that the driver grew by, its requests to the store."""
    scale_replicas.warm()
    return phases(n)


def phases(n: int) -> dict[str, Any]:
    shards = manifest([f"part-{i:05d}.parquet" for i in range(n)])
    store = LabelStore(f"memory:///{uuid.uuid4().hex}")
    asked = scale_replicas.settings(2, silent=True)
    store.open(pipeline.identity(asked, MODEL, shards["digest"]))
    store.finish({"codec": None})
    before = peak()
    seconds: dict[str, float] = {}
    requests: Counter[str] = Counter()
    seconds["plan"], todo = timed(lambda: planning.todo(shards, store), _TIMES)
    assert len(todo) == n
    ran = scale_replicas.run(asked, todo, shards)
    own = ran.done.since(ran.noted[0])  # the start of replicas is no shard's
    seconds["run"] = ran.prepared.wall_s + own.wall_s
    held = commit(store, todo[: n // 2])
    seconds["resume"], left = timed(lambda: planning.todo(shards, store), _TIMES)
    assert len(left) == n - n // 2
    held += commit(store, left)
    with counted(requests):
        planning.todo(shards, store)
        seconds["finish"], finished = timed(
            lambda: finishing.finish(store, asked, asked.teacher, shards)
        )
    assert finished["totals"]["rows"] == n * ROWS
    grown = peak() - before - held
    driver_s = ran.prepared.driver_s + own.driver_s
    return {"shards": n, "seconds": seconds, "driver_s": driver_s, "bytes": grown,
            "requests": requests}  # fmt: skip


def commit(store: LabelStore, shards: list[str]) -> int:
    """What replicas do, at no cost of the driver's; returns by how much the store grew."""
    before = peak()
    for shard in shards:
        store._commits.create(commit_of(shard))
    return peak() - before


def timed(work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """The least of several times, of what takes microseconds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- many replicas ---


def replicas(
    n: int, n_blocks: int, per_block: int, slow_s: float, in_hosts: bool
) -> dict[str, Any]:
    scale_replicas.warm()
    return scale_replicas.handing_out(n, n_blocks, per_block, slow_s, in_hosts)


def tally(per_s: float, window_s: float) -> list[dict[str, float]]:
    scale_replicas.connect()
    return scale_replicas.reporting(ALL, per_s, window_s, _WINDOWS, _REPORTERS)


PARTS: dict[str, Callable[..., Any]] = {"size": size, "replicas": replicas, "tally": tally}


if __name__ == "__main__":
    os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own
    sys.argv[0] = __file__  # by its folder actors find the modules beside this one
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.exit(main())
