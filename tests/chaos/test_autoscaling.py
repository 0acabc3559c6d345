"""Labeling on a cluster that grows and shrinks: nodes come for it, two are lost, and all go."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from journeyman.labels.store import LabelStore
from tests import ray_head
from tests.chaos import labeling
from tests.chaos.labeling import engines, until
from tests.chaos.test_chaos import WITHOUT_ENGINE, labels, write_recipe

N_ROWS = 1200


def raylet_of(engine: psutil.Process) -> int:
    """The process id of the node that an engine runs on."""
    [raylet] = [p.pid for p in engine.parents() if p.name() == "raylet"]
    return raylet


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_come_are_lost_in_mid_shard_and_go_again(tmp_path: Path):
    """0 → 3 → 0 worker nodes, two of them killed: two to four minutes."""
    recipe = write_recipe(
        tmp_path,
        [f"row {i}" for i in range(N_ROWS)],
        rows_per_shard=40,
        teacher={
            "model": labeling.nothing_but_a_name(tmp_path / "model"),
            "max_model_len": 512,
            "max_num_seqs": 2,
            "engine_args": {"row_s": 0.3, "start_s": 0.3},  # a shard takes 12 s
        },
        labels={"kind": "logits", "k": 4},
        cluster={"replicas": {"min": 1, "max": 3}},
    )
    alone = {"RAY_ADDRESS": "local", **WITHOUT_ENGINE}
    undisturbed = ("--set=name=undisturbed", "--set=teacher.engine_args.row_s=0")
    for step in ("prepare", "label"):
        done = labeling.journeyman(tmp_path, step, str(recipe), *undisturbed, **alone)
        assert done.returncode == 0, done.stderr

    mark = labeling.environment(tmp_path, **WITHOUT_ENGINE)
    of_test = {k: v for k, v in mark.items() if k not in os.environ or os.environ[k] != v}
    with ray_head.cluster(0, max_workers=3, **of_test | {"RAY_AUTH_MODE": "token"}) as head:
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
    assert labels(tmp_path / "disturbed").equals(labels(tmp_path / "undisturbed"))
