"""A teacher whose workers stand on two nodes, put there by vLLM's executor on Ray.

The workers are those of vLLM's CPU build, which Ray takes for GPUs (on_path/sitecustomize.py).
"""

import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from journeyman.labels import dataset
from journeyman.labels.codec import Codec
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from tests.benchmarks import tiny_teacher
from tests.chaos import labeling
from tests.chaos.labeling import processes, until
from tests.chaos.test_chaos import TOLERANCE, label_undisturbed, write_recipe

N_ROWS = 240
WORKERS = "ray::RayWorkerProc"
ON_TWO_NODES = (
    "teacher.engine_args={distributed_executor_backend: ray}",
    "cluster.gpus_per_replica=1",
)


def node_of(worker: psutil.Process) -> int:
    """The process id of its raylet."""
    [raylet] = [p.pid for p in worker.parents() if p.name() == "raylet"]
    return raylet


def decoded(run: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, and of all positions the likeliest entry's id and log-probability."""
    store = LabelStore(run / "labels")
    codec = Codec.described(store.manifest()["codec"])
    rows = dataset.read(store.where).to_pylist()
    each = [codec.decode(row["logprobs"], row["n_positions"]) for row in rows]
    first = np.concatenate([d.token_ids[:, 0] for d in each])
    return [row["id"] for row in rows], first, np.concatenate([d.logprobs[:, 0] for d in each])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_a_teacher_over_two_nodes_outlives_one_of_them(
    parallel: str, tmp_path: Path, teacher_model: Model
):
    """Labeled by two nodes, one of them killed in the middle: as one worker labels. Two minutes."""
    recipe = write_recipe(
        tmp_path,
        [f"Row {i} of a text that is neither short nor long." for i in range(N_ROWS)],
        rows_per_shard=20,
        teacher={
            "model": str(tiny_teacher.make(tmp_path / "model", teacher_model)),
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 4,
            "cpu_kv_cache_gib": 1,
        },
        labels={"kind": "logits", "k": 8, "shards_in_flight": 1},
    )
    spread = (f"teacher.{parallel}_parallel_size=2", *ON_TWO_NODES)
    store = LabelStore(tmp_path / "disturbed" / "labels")
    with labeling.cluster(2, tmp_path, n_gpus=1, JOURNEYMAN_TEST_GPUS="1",
                          JOURNEYMAN_TEST_COMMIT_S="1.5") as nodes:  # fmt: skip
        undisturbed = label_undisturbed(tmp_path, recipe, nodes.address)
        arguments = [str(recipe), f"--set=cluster.address={nodes.address}",
                     *(f"--set={setting}" for setting in spread)]  # fmt: skip
        assert labeling.journeyman(tmp_path, "prepare", *arguments).returncode == 0
        run = labeling.Command(tmp_path, "label", *arguments)
        try:
            until(lambda: len(store.done()) >= 2, 150)
            workers = processes(tmp_path, WORKERS)
            at = {node_of(worker) for worker in workers}
            assert at == set(nodes.raylets) and len(workers) == 2
            replica = processes(tmp_path, "ray::MapWorker")
            [other] = at - {node_of(p) for p in replica}
            os.kill(other, signal.SIGKILL)
            n_done = len(store.done())
            nodes.replace_dead_node()
            run.wait(300)
        finally:
            run.stop()
    assert n_done < N_ROWS / 20 - 2, "nothing was under way"
    assert run.statuses == [0], run.log()
    totals = store.manifest()["totals"]
    assert totals["rows"] == totals["ok"] == N_ROWS
    assert totals["engine_restarts"] >= 1
    ids, first, logprobs = decoded(tmp_path / "disturbed")
    expected_ids, expected_first, expected = decoded(undisturbed)
    assert ids == expected_ids
    assert np.array_equal(first, expected_first)
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=TOLERANCE)
