"""One step of two real workers on gloo against one worker with the whole batch."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.student import checkpoints, worker
from journeyman.student.causal_learner import Causal
from journeyman.student.classifying import Classifying
from journeyman.student.lesson import Lesson, Load, Task, prepare

from .conftest import make_causal_recipe, make_recipe, make_rows, write_token_rows

BATCHES = [[3, 1, 4, 0, 2], [6], [5, 7]]  # shards of 3 and 2 rows, of 1 and none, of 1 and 1


def classifying(encoder: Path, accumulate: int) -> tuple[Recipe, Load]:
    recipe = make_recipe(gold_weight=0.3, batch_size=6, accumulate=accumulate)
    return recipe, partial(
        Classifying,
        model_dir=encoder,
        student=recipe.learner(),
        training=recipe.training,
        read_rows=lambda: make_rows(n_train=8, n_calibrate=2),
    )


def writing(llama: Path, accumulate: int) -> tuple[Recipe, Load]:
    recipe = make_causal_recipe(batch_size=6, cross_entropy=0.2, accumulate=accumulate)
    return recipe, partial(
        Causal,
        model_dir=llama,
        student=recipe.learner(),
        training=recipe.training,
        rows_dir=llama / "rows",
    )


def steps(
    kind: str, model: Path, accumulate: int, work: Path, place: worker.Place
) -> dict[str, np.ndarray]:
    """Losses, and the gradients of the last step."""
    recipe, load = {"classifier": classifying, "causal": writing}[kind](model, accumulate)
    task = Task(
        training=recipe.training, checkpoints=checkpoints.Checkpoints.claim(work), load=load
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


def main(rank: int, kind: str, accumulate: int, model: Path, work: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work / 'meet'}", rank=rank, world_size=2
    )
    place = worker.Place(rank=rank, world_size=2, device=torch.device("cpu"))
    found = steps(kind, model, accumulate, work / str(rank), place)
    (work / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    # Without this gloo's threads may outlive the interpreter, which then aborts.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_two_workers_take_the_step_of_one(
    kind: str, accumulate: int, tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    model = tiny_encoder.path
    if kind == "causal":
        model = shutil.copytree(tiny_llama.path, tmp_path / "llama")
        write_token_rows(model / "rows", n_train=8, n_calibrate=2)
    code = (
        f"import sys; from pathlib import Path; sys.path.append('.'); from {__name__} import main; "
        "rank, kind, n, *paths = sys.argv[1:]; main(int(rank), kind, int(n), *map(Path, paths))"
    )
    arguments = [kind, str(accumulate), str(model), str(tmp_path)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    alone = steps(
        kind,
        model,
        1,
        tmp_path / "alone",
        worker.Place(rank=0, world_size=1, device=torch.device("cpu")),
    )
    assert [w.wait() for w in workers] == [0, 0]
    for rank in range(2):
        shared = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        for name, expected in alone.items():
            np.testing.assert_allclose(shared[name], expected, atol=2e-5, err_msg=name)
