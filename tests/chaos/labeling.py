"""A labeling run on a Ray cluster, kept going while its processes are killed at random."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from journeyman import corpus, steps
from journeyman.labels import pipeline
from journeyman.labels import replica as replica_module
from journeyman.labels.replica import Replica, ReplicaSpec
from journeyman.labels.store import LabelStore
from journeyman.teacher import engine as engine_module
from tests.chaos.on_path import stand_in
from tests.conftest import ROOT

ON_PATH = Path(__file__).parent / "on_path"
KINDS = ("driver", "replica", "engine", "node")
_MARK = "JOURNEYMAN_TEST"  # environment variable by which a test's processes are known
_PATIENCE_S = 90.0  # for a process to appear that can be killed


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of every process of a run; ``folder`` is how they are told from those of others."""
    return {
        **os.environ,
        # Ray's tokens for local clusters are of no use to a cluster that is gone in a minute.
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ON_PATH)]),
        _MARK: str(folder),
        **more,
    }


def processes(folder: Path, title: str = "") -> list[psutil.Process]:
    """Living processes of a run whose title holds these words."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if title in " ".join(process.cmdline()) and process.environ().get(_MARK) == str(folder):
                found.append(process)
    return found


def engines(folder: Path) -> list[psutil.Process]:
    return processes(folder, "VLLM::EngineCore")


def until(true: Callable[[], Any], seconds: float = _PATIENCE_S, poll_s: float = 0.1) -> Any:
    """Wait for something, and return it."""
    deadline = time.monotonic() + seconds
    while not (result := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {seconds:g} s")
        time.sleep(poll_s)
    return result


class Cluster:
    """Several raylets on this machine, see nodes.py."""

    def __init__(self, n_nodes: int, env: dict[str, str], n_gpus: int = 0) -> None:
        self._n_nodes = n_nodes
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("nodes.py"), str(n_nodes), str(n_gpus)],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._listen()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # a word of Ray's own
                told = json.loads(line)
                self.address, self.raylets = told["address"], told["raylets"]
                return
        raise RuntimeError(f"nodes.py ended with status {self._process.wait()}")

    def replace_dead_node(self) -> None:
        self.have(self._n_nodes)

    def have(self, n_nodes: int) -> None:
        """Clear away what is left of killed nodes, then add nodes until there are so many."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{n_nodes}\n")
        self._process.stdin.flush()
        self._listen()

    def close(self) -> None:
        self._process.communicate(timeout=60)


def nothing_but_a_name(folder: Path) -> str:
    """A model for an engine that reads none."""
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 256}')
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    return str(folder)


@contextlib.contextmanager
def cluster(n_nodes: int, folder: Path, n_gpus: int = 0, **more: str) -> Iterator[Cluster]:
    """n_gpus: of a node. Ends with no process left."""
    started = Cluster(n_nodes, environment(folder, **more), n_gpus)
    try:
        yield started
    finally:
        started.close()
        with contextlib.suppress(TimeoutError):
            until(lambda: not processes(folder), 20)
        left = [(p.pid, " ".join(p.cmdline())[:80]) for p in processes(folder)]
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert left == [], "processes outlive their cluster"


def journeyman(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "journeyman.cli", *arguments],
        cwd=ROOT,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


StandIn: Any = stand_in.engine(engine_module)


def replica_here(run: steps.Run, engine: Any = StandIn) -> Replica:
    """A replica of a prepared run, in this process and without a real engine."""
    digest = corpus.read_manifest(run.path("prepare"))["digest"]
    store = LabelStore(run.labels)
    store.open(pipeline.identity(run.recipe, run.teacher, digest))
    if codec := replica_module.codec_of(run.recipe.labels, run.teacher):
        store.finish({"codec": codec.describe()})
    spec = ReplicaSpec(
        recipe=run.recipe,
        teacher=run.recipe.teacher,
        model=run.teacher,
        corpus_dir=run.path("prepare"),
        labels=store.where,
        identity=store.manifest()["identity"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_module, "Engine", engine)
        return Replica(spec, lambda *_: None)


class Command:
    """``journeyman`` in a process of its own, started again whenever it ends badly."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._command = [sys.executable, "-m", "journeyman.cli", *arguments]
        self._folder = folder
        self._log = folder / "driver.log"
        self._stop = threading.Event()
        self.statuses: list[int] = []  # with which it ended each time
        self.process = self._start()
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()

    @property
    def done(self) -> bool:
        return self.statuses[-1:] == [0]

    def wait(self, seconds: float) -> None:
        """Until it ends well."""
        self._keeper.join(seconds)
        assert self.done, f"not done within {seconds:g} s: {self.log()}"

    def stop(self) -> None:
        self._stop.set()
        self.process.kill()
        self._keeper.join()

    def log(self) -> str:
        return self._log.read_text()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, cwd=ROOT, env=environment(self._folder), stdout=log, stderr=log
            )

    def _keep(self) -> None:
        while True:
            self.statuses.append(self.process.wait())
            if self.done or self._stop.is_set():
                return
            self.process = self._start()


@dataclass
class Killer:
    """SIGKILLs the processes of a labeling run, one after another, at random moments.

    ready: waited for before each kill; after_kill: told what was killed.
    """

    folder: Path
    cluster: Cluster
    labeling: Command
    random: random.Random
    pause_s: tuple[float, float]
    ready: Callable[[], bool]
    after_kill: Callable[[str], None]
    kills: list[str] = field(default_factory=list)

    def run(self, kinds: Sequence[str]) -> None:
        started = time.monotonic()
        for kind in kinds:
            until(self.ready)
            time.sleep(self.random.uniform(*self.pause_s))
            pid = until(lambda kind=kind: self._kill(kind))
            self.kills.append(kind)
            print(f"{time.monotonic() - started:6.1f} s  SIGKILL {kind} {pid}", flush=True)
            self.after_kill(kind)

    def _kill(self, kind: str) -> int | None:
        """Kill one of a kind; None if there is none just now, or it has just gone by itself."""
        assert not self.labeling.done, f"the run was over after {Counter(self.kills)}"
        gone = (ProcessLookupError, psutil.NoSuchProcess, IndexError, ValueError)
        with contextlib.suppress(*gone):
            pid = {
                "driver": lambda: self.labeling.process.pid,
                "replica": self._replica,
                "engine": lambda: self.random.choice(engines(self.folder)).pid,
                "node": self._raylet,
            }[kind]()
            # A replica must be there whatever is killed: else nothing was under way.
            if engines(self.folder):
                os.kill(pid, signal.SIGKILL)
                if kind == "node":
                    self.cluster.replace_dead_node()
                return pid
        return None

    def _replica(self) -> int:
        return self.random.choice(engines(self.folder)).ppid()

    def _raylet(self) -> int:
        """Of a node that has a replica; ValueError if its raylet is dead already."""
        replica = psutil.Process(self._replica())
        (raylet,) = {p.pid for p in replica.parents()} & set(self.cluster.raylets)
        return raylet


def shuffled(generator: random.Random, **counts: int) -> list[str]:
    """So many kills of each kind, in random order."""
    kinds = [kind for kind, n in counts.items() for _ in range(n)]
    generator.shuffle(kinds)
    return kinds
