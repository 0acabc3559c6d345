"""One step of two real workers on gloo against one worker with the whole batch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from journeyman.models import Model
from journeyman.student import checkpoints, worker
from journeyman.student.classifying import Classifying
from journeyman.student.lesson import Lesson, Task, prepare

from .conftest import make_recipe, make_rows

BATCHES = [[3, 1, 4, 0, 2], [6], [5, 7]]  # shards of 3 and 2 rows, of 1 and none, of 1 and 1


def steps(encoder: Path, work: Path, place: worker.Place) -> dict[str, np.ndarray]:
    """Losses, and the gradients of the last step."""
    recipe = make_recipe(gold_weight=0.3, batch_size=6)
    task = Task(
        training=recipe.training,
        checkpoints=checkpoints.Checkpoints.claim(work),
        load=partial(
            Classifying,
            model_dir=encoder,
            student=recipe.learner(),
            training=recipe.training,
            read_rows=lambda: make_rows(n_train=8, n_calibrate=2),
        ),
    )
    lesson: Lesson = prepare(task, None, place.device)
    for module in lesson.learner.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # workers draw their own
    parallel = worker._parallel(lesson.learner.module, place)
    shares = [worker._share(np.array(batch), task.training, place) for batch in BATCHES]
    loaded = lesson.learner.batches(part for share in shares for part in share.parts)
    losses = [
        worker._step(parallel, share, loaded, i, task, lesson, place)
        for i, share in enumerate(shares)
    ]
    gradients = {n: p.grad.numpy() for n, p in lesson.learner.module.named_parameters()}
    return {"losses": np.array(losses), **gradients}


def main(rank: int, encoder: Path, work: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work / 'meet'}", rank=rank, world_size=2
    )
    place = worker.Place(rank=rank, world_size=2, device=torch.device("cpu"))
    found = steps(encoder, work / str(rank), place)
    (work / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    # Without this gloo's threads may outlive the interpreter, which then aborts.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_workers_take_the_step_of_one(tiny_encoder: Model, tmp_path: Path) -> None:
    code = (
        f"import sys; from pathlib import Path; sys.path.append('.'); from {__name__} import main; "
        "main(int(sys.argv[1]), *map(Path, sys.argv[2:]))"
    )
    arguments = [str(tiny_encoder.path), str(tmp_path)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    alone = steps(
        tiny_encoder.path,
        tmp_path / "alone",
        worker.Place(rank=0, world_size=1, device=torch.device("cpu")),
    )
    assert [w.wait() for w in workers] == [0, 0]
    for rank in range(2):
        shared = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        for name, expected in alone.items():
            np.testing.assert_allclose(shared[name], expected, atol=2e-5, err_msg=name)
