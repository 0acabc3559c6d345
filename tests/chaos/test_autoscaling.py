"""Labeling on a cluster that grows and shrinks: nodes come for it, two are lost, and all go."""

import os
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from journeyman.labels.store import LabelStore
from tests import ray_head
from tests.chaos import labeling
from tests.chaos.labeling import engines, until
from tests.chaos.test_chaos import WITHOUT_ENGINE, labels, write_recipe
from tests.journeyman.test_spot import Metadata

N_ROWS = 1200
ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"


def raylet_of(engine: psutil.Process) -> int:
    """The process id of the node that an engine runs on."""
    [raylet] = [p.pid for p in engine.parents() if p.name() == "raylet"]
    return raylet


def prepared(folder: Path, max_replicas: int, row_s: float) -> tuple[Path, Path]:
    """A recipe, and the folder of a run of it that nobody disturbed."""
    recipe = write_recipe(
        folder,
        [f"row {i}" for i in range(N_ROWS)],
        rows_per_shard=40,
        teacher={
            "model": labeling.nothing_but_a_name(folder / "model"),
            "max_model_len": 512,
            "max_num_seqs": 2,
            "engine_args": {"row_s": row_s, "start_s": 0.3},
        },
        labels={"kind": "logits", "k": 4},
        cluster={"replicas": {"min": 1, "max": max_replicas}},
    )
    alone = {"RAY_ADDRESS": "local", **WITHOUT_ENGINE}
    settings = ("--set=name=undisturbed", "--set=teacher.engine_args.row_s=0")
    for step in ("prepare", "label"):
        done = labeling.journeyman(folder, step, str(recipe), *settings, **alone)
        assert done.returncode == 0, done.stderr
    return recipe, folder / "undisturbed"


def of_processes(folder: Path) -> dict[str, str]:
    """Variables by which a test's processes are known, and have the stand-in for an engine."""
    marked = labeling.environment(folder, **WITHOUT_ENGINE) | {"RAY_AUTH_MODE": "token"}
    return {name: value for name, value in marked.items() if os.environ.get(name) != value}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_come_are_lost_in_mid_shard_and_go_again(tmp_path: Path):
    """0 → 3 → 0 worker nodes, two of them killed: two to four minutes."""
    recipe, undisturbed = prepared(tmp_path, max_replicas=3, row_s=0.3)  # a shard takes 12 s
    with ray_head.cluster(0, max_workers=3, **of_processes(tmp_path)) as head:
        seen = Counter({head.n_nodes() - 1: 1})
        at = (str(recipe), f"--set=cluster.address={head.address}")
        assert head.journeyman("prepare", *at).returncode == 0
        store = LabelStore(tmp_path / "disturbed" / "labels")
        with head.started("label", *at) as run:
            until(lambda: len(engines(tmp_path)) == 3, 120)
            seen[head.n_nodes() - 1] += 1
            until(lambda: len(store.done()) >= 2, 60)
            for engine in engines(tmp_path)[:2]:
                os.kill(raylet_of(engine), signal.SIGKILL)
            n_done = len(store.done())
            out, err = run.communicate(timeout=300)
        assert run.returncode == 0, out + err
        assert n_done < N_ROWS / 40 - 6, "nothing was under way"
        started = time.monotonic()
        until(lambda: head.n_nodes() == 1, 90)
        print(f"the nodes were gone {time.monotonic() - started:.0f} s after the run")
    assert set(seen) == {0, 3}
    totals = store.manifest()["totals"]
    assert totals["rows"] == totals["ok"] == N_ROWS
    assert labels(tmp_path / "disturbed").equals(labels(undisturbed))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_spot_node_that_is_taken_away_finishes_what_it_has_in_hand(tmp_path: Path):
    """The notice comes to one of two nodes: no shard is begun twice. A minute or two."""
    recipe, undisturbed = prepared(tmp_path, max_replicas=2, row_s=0.1)  # a shard takes 4 s
    stays, goes = Metadata(), Metadata()
    nodes = [{ENDPOINT: f"http://127.0.0.1:{each.server_port}"} for each in (stays, goes)]
    with ray_head.cluster(0, nodes, **of_processes(tmp_path)) as head:
        settings = (f"--set=cluster.address={head.address}", "--set=cluster.spot=aws")
        assert head.journeyman("prepare", str(recipe), *settings).returncode == 0
        store = LabelStore(tmp_path / "disturbed" / "labels")
        with head.started("label", str(recipe), *settings) as run:
            until(lambda: len(store.done()) >= 4, 120)
            assert len(engines(tmp_path)) == 2
            goes.taken_at = datetime.now(UTC) + timedelta(seconds=40)
            until(lambda: head.n_nodes() == 2, 80)  # the head, and the one that stays
            n_done = len(store.done())
            out, err = run.communicate(timeout=240)
        assert run.returncode == 0, out + err
    assert n_done < N_ROWS / 40, "nothing was left to do"
    assert labels(tmp_path / "disturbed").equals(labels(undisturbed))
    written = list((tmp_path / "disturbed" / "labels" / "shards").iterdir())
    assert len(written) == N_ROWS / 40


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_replicas_keep_to_nodes_with_the_labels_asked_for(tmp_path: Path):
    """Two nodes, room for both replicas on each: half a minute or more."""
    recipe, undisturbed = prepared(tmp_path, max_replicas=2, row_s=0.02)
    gpus = {"RAY_OVERRIDE_LABELS": '{"ray.io/accelerator-type": "L4"}'}
    half = "--set=cluster.cpus_per_replica=0.5"
    with ray_head.cluster(0, [{}, gpus], **of_processes(tmp_path)) as head:
        settings = (f"--set=cluster.address={head.address}", half,
                    "--set=cluster.node_labels={ray.io/accelerator-type: L4}",
                    "--set=cluster.replicas.min=2")  # fmt: skip
        assert head.journeyman("prepare", str(recipe), *settings).returncode == 0
        with head.started("label", str(recipe), *settings) as run:
            until(lambda: len(engines(tmp_path)) == 2, 120)
            raylets = [psutil.Process(raylet_of(engine)) for engine in engines(tmp_path)]
            assert {r.environ().get("RAY_OVERRIDE_LABELS") for r in raylets} == set(gpus.values())
            out, err = run.communicate(timeout=240)
        assert run.returncode == 0, out + err
    assert labels(tmp_path / "disturbed").equals(labels(undisturbed))
