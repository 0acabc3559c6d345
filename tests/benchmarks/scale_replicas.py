"""Simulated replicas: what they take of the driver, and of the tally.

What runs is ``pipeline``'s: its pass of Ray Data, its actors, its tally. Only the replica inside an
actor is another, which is done with quick shards at once, and with slow ones when it is told to
be. Actors ask for no CPU, so that one machine has many: each is a process, as many as its memory
holds, or hosts keep many of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import ray.data
from scale_hosts import at_the_end_of_start, hosted

from journeyman import cluster, recipe
from journeyman.labels import pipeline, planning
from journeyman.labels.replica import Counts, ReplicaSpec, Work, report_interval_s
from journeyman.labels.schema import Commit
from journeyman.logs import Log
from journeyman.models import Model

ROWS = 100  # of a shard
MODEL = Model(reference="none", path=Path(), weights_digest="", tokenizer_digest="", size_bytes=0)
_SLOW = "slow-"  # how the names of slow shards begin
# Files: a replica tells that it is there, or in a slow shard, and is told to begin, or to end one.
_HERE, _GO, _END = "here-", "go", "end"
_COUNTED = 0.95  # of the quick shards: Ray Data's iterator holds the newest blocks back
_PROCESSES = ("driver", "tally", "control")
_POLL_S = 0.1
_PATIENCE_S = 900.0
# As a busy replica's, whose fields are those of its report that are not nothing.
_REPORT = Counts(rows=1, prompt_tokens=25, cached_tokens=5, output_tokens=1, replica_seconds=0.5)


def settings(n_replicas: int, *, silent: bool = False) -> recipe.Recipe:
    """silent: replicas neither log nor report, so that little is timed but what the driver does."""
    return recipe.parse(
        {
            "name": "scale",
            "corpus": {"sources": ["none"], "rows_per_shard": ROWS},
            "teacher": {"model": "none", "max_model_len": 64, "engine_args": {"silent": silent}},
            "labels": {"kind": "logits", "k": 4},
            "cluster": {"replicas": {"min": n_replicas, "max": n_replicas}, "cpus_per_replica": 0},
        }
    )


def manifest(shards: Sequence[str]) -> dict[str, Any]:
    rows = len(shards) * ROWS
    each = [{"name": shard, "rows": ROWS} for shard in shards]
    return {"rows": rows, "shards": each, "digest": "none", "splits": {"train": rows}}


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


# --- in the actors ---


class SimulatedReplica:
    """Stands in for ``replica.Replica``; begins when it is told that all of them are there."""

    start_seconds = 0.0

    def __init__(self, spec: ReplicaSpec, report: Any) -> None:
        self._silent = spec.teacher.engine_args["silent"]
        self._interval_s = report_interval_s(spec.recipe.cluster.replicas.max)
        self._name, self._report = uuid.uuid4().hex[:8], report
        self._crowd = Path(spec.corpus_dir)
        report(self._name, Counts())
        if not self._silent:
            threading.Thread(target=self._beat, daemon=True).start()
        (self._crowd / f"{_HERE}{self._name}-{os.getpid()}").touch()
        at_the_end_of_start(_told(self._crowd / _GO).wait)

    def label(self, work: Work) -> Commit:
        """As a replica's, the end of a shard is reported; that of a slow one, which stands for a
        part of a minute's, is not."""
        if work.shard.startswith(_SLOW):
            (self._crowd / f"{_SLOW}{self._name}").touch()
            _told(self._crowd / _END).wait()
        elif not self._silent:
            self._report(self._name, _REPORT)
        return commit_of(work.shard)

    def _beat(self) -> None:
        while True:
            time.sleep(self._interval_s)
            self._report(self._name, _REPORT)


@functools.cache
def _told(file: Path) -> threading.Event:
    """Set once there is this file, which one thread of a process looks for."""
    event = threading.Event()

    def look() -> None:
        while not file.exists():
            time.sleep(_POLL_S)
        event.set()

    threading.Thread(target=look, daemon=True).start()
    return event


class Labeler(pipeline._ShardLabeler):
    """The pipeline's own actor around a simulated replica."""

    def __init__(self, spec: ReplicaSpec, tally: Any) -> None:
        pipeline.Replica = SimulatedReplica  # type: ignore[assignment,misc]
        super().__init__(spec, tally)
        if spec.teacher.engine_args["silent"]:
            self._log = Log(None, "silent")


# --- in the driver ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Up to a moment, or between two: seconds of the clock, and of a processor by the driver, the
    tally and Ray's control store; reports that the tally has had."""

    wall_s: float
    driver_s: float
    tally_s: float
    control_s: float
    reports: int

    def since(self, before: Spent) -> Spent:
        return Spent(**{
            field.name: getattr(self, field.name) - getattr(before, field.name)
            for field in dataclasses.fields(Spent)
        })  # fmt: skip


class Watched(pipeline._Run):
    """A pass over quick shards, and slow ones behind them, that notes what is spent on it.

    prepared: by the driver before Ray Data starts. noted: when the replicas begin, and after each
    third of the quick shards. at_work: in so many seconds in which each is in slow shards. done:
    when all shards are.
    """

    def __init__(
        self, spec: ReplicaSpec, work: Sequence[Work], of: dict[str, Any], slow_s: float = 0.0
    ) -> None:
        super().__init__(spec, work, of, lambda _: None)
        self.n_counted = round(_COUNTED * sum(not w.shard.startswith(_SLOW) for w in work))
        self._marks = {self.n_counted * third // 3 for third in (1, 2, 3)}
        self._slow_s = slow_s
        self.noted: list[Spent] = []

    def _start_tally(self) -> Any:
        tally = super()._start_tally()
        ray.get(tally.total.remote())
        self._tally_process = psutil.Process(ray.get(tally.__ray_call__.remote(_pid)))
        below = psutil.Process().children(recursive=True)
        self._control = next(process for process in below if "gcs_server" in process.name())
        return tally

    def _dataset(self) -> Any:
        before = self._spent()
        dataset = super()._dataset()
        self.prepared = self._spent().since(before)
        self._conductor = threading.Thread(target=self._conduct, daemon=True)
        self._conductor.start()
        return SimpleNamespace(iter_rows=lambda: self._noting(dataset.iter_rows()))

    def _conduct(self) -> None:
        """Have all replicas begin at once, and look at them while they are at work."""
        crowd = Path(self._spec.corpus_dir)
        self.pids = {int(name.rpartition("-")[2]) for name in self._until_all(_HERE)}
        memory = [psutil.Process(pid).memory_full_info().uss for pid in self.pids]
        self.replica_bytes = sum(memory) // self._spec.recipe.cluster.replicas.max
        self.noted.append(self._spent())
        (crowd / _GO).touch()
        if self._slow_s:
            self._until_all(_SLOW)
            before = self._spent()
            time.sleep(self._slow_s)
            self.at_work = self._spent().since(before)
            (crowd / _END).touch()

    def _until_all(self, begins: str) -> list[str]:
        crowd, n = Path(self._spec.corpus_dir), self._spec.recipe.cluster.replicas.max
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            found = [file.name for file in crowd.iterdir() if file.name.startswith(begins)]
            if len(found) == n:
                return found
            time.sleep(_POLL_S)
        print(f"{len(found)} of {n} replicas are {begins}", file=sys.stderr, flush=True)
        os._exit(1)  # they would wait for good

    def _noting(self, records: Iterator[Any]) -> Iterator[Any]:
        for i, record in enumerate(records, 1):
            if i in self._marks:
                self.noted.append(self._spent())
            yield record
        self._conductor.join()
        self.done = self._spent()

    def _spent(self) -> Spent:
        return Spent(
            wall_s=time.perf_counter(),
            driver_s=time.process_time(),
            tally_s=processor_s(self._tally_process),
            control_s=processor_s(self._control),
            reports=ray.get(self._tally.total.remote())[0].rows,
        )


def _pid(_: Any) -> int:
    return os.getpid()


def processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run(
    asked: recipe.Recipe,
    shards: Sequence[str],
    of: dict[str, Any],
    slow_s: float = 0.0,
    *,
    in_hosts: bool = False,
) -> Watched:
    """Label shards of a corpus with this manifest."""
    with tempfile.TemporaryDirectory() as crowd:
        spec = ReplicaSpec(recipe=asked, teacher=asked.teacher, model=MODEL,
                           corpus_dir=Path(crowd), labels="none", identity={})  # fmt: skip
        watched = Watched(spec, [Work(shard=shard) for shard in shards], of, slow_s)
        with simulated(), hosted() if in_hosts else contextlib.nullcontext():
            watched.run()
    _until_gone(watched.pids)
    return watched


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    own = pipeline._ShardLabeler
    pipeline._ShardLabeler = Labeler  # type: ignore[misc]
    try:
        yield
    finally:
        pipeline._ShardLabeler = own  # type: ignore[misc]


def _until_gone(pids: Collection[int]) -> None:
    """Or the next measurement has less of the machine."""
    deadline = time.monotonic() + _PATIENCE_S
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


# --- what is measured ---


def handing_out(
    n_replicas: int, n_blocks: int, per_block: int, slow_s: float, in_hosts: bool
) -> dict[str, Any]:
    """Quick shards as fast as they go, and then so many seconds in which all replicas are at work
    and none is done. n_blocks: at least, and as many as a run of so many replicas has. in_hosts:
    few processes keep all replicas.

    us: of a quick shard, by third. cores: shares of a processor while all are at work.
    """
    asked = settings(n_replicas)
    slots = n_replicas * asked.labels.shards_in_flight
    n_blocks = max(n_blocks, planning._ROUNDS * slots)
    n_slow = 2 * slots * per_block  # what Ray Data has given out at a time: each has its share
    n_quick = n_blocks * per_block - n_slow
    shards = [f"part-{i:05d}.parquet" for i in range(n_quick)]
    shards += [f"{_SLOW}{i:05d}.parquet" for i in range(n_slow)]
    assert planning.shards_per_block(len(shards), slots) == per_block
    started = time.perf_counter()
    watched = run(asked, shards, manifest(shards), slow_s, in_hosts=in_hosts)
    thirds = [after.since(before) for before, after in itertools.pairwise(watched.noted)]
    at_work = watched.at_work
    return {
        "shards": n_quick,
        "start_s": watched.noted[0].wall_s - started,
        "replica_mb": watched.replica_bytes / 1e6,
        "us": {
            who: [1e6 * getattr(spent, f"{who}_s") / (watched.n_counted / 3) for spent in thirds]
            for who in ("wall", *_PROCESSES)
        },
        "at_work_s": at_work.wall_s,
        "reports_per_s": at_work.reports / at_work.wall_s,
        "cores": {who: getattr(at_work, f"{who}_s") / at_work.wall_s for who in _PROCESSES},
    }


class Crowd:
    """An actor in which many replicas report, each at its own time."""

    def __init__(self, tally: Any, n_replicas: int) -> None:
        self._tally = tally
        self._names = [uuid.uuid4().hex[:8] for _ in range(n_replicas)]

    def report(self, per_s: float, seconds: float) -> int:
        """per_s: of all of them; returns how many reports were sent."""
        began = time.monotonic()
        for i in range(round(per_s * seconds)):
            if (wait_s := began + i / per_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            self._tally.add.remote(self._names[i % len(self._names)], _REPORT)
        return round(per_s * seconds)


def reporting(
    n_replicas: int, per_s: float, window_s: float, n_windows: int, n_processes: int
) -> list[dict[str, float]]:
    """The tally's actor, while so many replicas report so often a second, each.

    us: processor time of a report; cores: the tally's share of a processor; late_s: from the last
    report on, until the tally has had them all.
    """
    asked = settings(1)
    spec = ReplicaSpec(recipe=asked, teacher=asked.teacher, model=MODEL, corpus_dir=Path(),
                       labels="none", identity={})  # fmt: skip
    watched = Watched(spec, [], manifest([]))
    tally = watched._tally = watched._start_tally()
    crowd = ray.remote(num_cpus=0)(Crowd)
    crowds = [crowd.remote(tally, n_replicas // n_processes) for _ in range(n_processes)]
    ask = n_replicas * per_s / n_processes
    ray.get([each.report.remote(ask, 0.5) for each in crowds])
    windows = []
    for _ in range(n_windows):
        before = watched._spent()
        sent = sum(ray.get([each.report.remote(ask, window_s) for each in crowds]))
        ended = time.perf_counter()
        while (after := watched._spent()).reports < before.reports + sent:
            time.sleep(0.01)
        spent = after.since(before)
        late_s = round(after.wall_s - ended, 2)
        windows.append({"us": spent.tally_s / sent * 1e6, "cores": spent.tally_s / spent.wall_s,
                        "per_s": sent / spent.wall_s, "late_s": late_s})  # fmt: skip
    for actor in (*crowds, tally):
        ray.kill(actor)
    return windows


def connect() -> None:
    cluster.connect(settings(1).cluster)


def warm() -> None:
    """What Ray Data imports and starts is no shard's cost."""
    connect()
    items = ray.data.from_items([{"work": ""}] * 2, override_num_blocks=2)
    items.map_batches(lambda batch: batch, num_cpus=0).take_all()
