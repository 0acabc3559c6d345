"""What is dear is started once for a session: Ray, a teacher's engine, a small finished run."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import hypothesis
import psutil
import pytest

from journeyman import cluster, models, recipe, steps
from journeyman.labels import pipeline
from journeyman.labels.replica import Counts, Replica, ReplicaSpec
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Recipe

hypothesis.settings.register_profile("journeyman", deadline=None)  # no test asserts on wall time
hypothesis.settings.load_profile("journeyman")

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "jobs" / "recipes" / "routing.yaml"

# A corpus that the real teacher labels in some twenty seconds.
SMALL = (
    "name=small",
    "corpus.limits={train: 60, calibrate: 30, certify: 60, test: 40}",
    "corpus.rows_per_shard=30",
    "training.epochs=2",
    "certify={alpha: 0.4}",
)


def small_recipe(output: Path, *overrides: str) -> Recipe:
    return recipe.load(DEMO, [*SMALL, f"output={output}", *overrides])


@pytest.fixture(scope="session", autouse=True)
def at_the_root() -> None:
    """The demo recipe names its corpus from the repository root."""
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_ADDRESS", "local")  # never one that someone else runs here, and ends
        cluster.connect(recipe.Cluster())
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def teacher_model() -> Model:
    """The demo's teacher, SmolLM2-135M-Instruct."""
    return models.resolve(recipe.load(DEMO).teacher.model)


@pytest.fixture(scope="session")
def reports() -> list[Counts]:
    """What the session's replica has reported."""
    return []


@pytest.fixture(scope="session")
def replica(
    teacher_model: Model, tmp_path_factory: pytest.TempPathFactory, reports: list[Counts]
) -> Iterator[Replica]:
    """A labeling replica of the demo's recipe in this process, with a real engine."""
    directory = tmp_path_factory.mktemp("replica")
    settings = small_recipe(directory, "labels.max_attempts=1")  # engine starts are dear
    with replica_of(settings, teacher_model, reports) as replica:
        yield replica


@contextlib.contextmanager
def replica_of(settings: Recipe, model: Model, reports: list[Counts]) -> Iterator[Replica]:
    """One in this process, whose labels lie in the recipe's output."""
    labels = LabelStore(Path(settings.output) / "labels")
    labels.open(pipeline.identity(settings, model, "corpus"))
    spec = ReplicaSpec(
        recipe=settings,
        teacher=settings.teacher,
        model=model,
        corpus_dir=Path(settings.output) / "corpus",
        labels=labels.where,
        identity=labels.manifest()["identity"],
    )
    replica = Replica(spec, lambda _, counts: reports.append(counts))
    try:
        yield replica
    finally:
        replica.close()


@pytest.fixture(scope="session")
def small_run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> steps.Run:
    """Every step of the demo on a small corpus but serving: real teacher, real training."""
    run = steps.Run(small_recipe(tmp_path_factory.mktemp("runs")))
    for name in ("prepare", "label", "train", "certify"):
        run.execute(name)
    return run


def scraped(prefix: str, run: str) -> dict[str, float]:
    """A run's metrics as Prometheus reads them from this node, by name behind the prefix; Ray
    exports every ten seconds."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    lines = urlopen(url, timeout=10).read().decode().splitlines()
    told = [re.match(rf"{prefix}(\w+)\{{(.*)\}} (\S+)", line) for line in lines]
    return {match[1]: float(match[3]) for match in told if match and f'run="{run}"' in match[2]}


def children(title: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Living processes below one (this one by default) whose title holds these words."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # zombies, too
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def journeyman(
    *arguments: str, timeout: float = 280, **options: object
) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "journeyman.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes (``64k``), mounted at folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
