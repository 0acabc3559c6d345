"""Training a student, seen from the driver: start Ray Train, follow it, export the best checkpoint.

A run's state lies beside its output, in ``.student-work-INPUTS``, and is our own rather than
Ray Train's: a run killed with its driver is a new run to Ray, but finds its work by ``inputs``.
On a cluster that folder is on a disk that all nodes share, or behind a URL.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from journeyman import allocating
from journeyman.cluster import hardware
from journeyman.errors import ClusterError, JourneymanError
from journeyman.files import disk_errors, scratch_folder
from journeyman.folder import Folder
from journeyman.mirror import Mirror
from journeyman.models import Model
from journeyman.recipe import Recipe, Training
from journeyman.student import export, worker
from journeyman.student.checkpoints import LORA, Checkpoints, Evaluation, State
from journeyman.student.lesson import Load, Task
from journeyman.student.live import TrainProgress

_WORK = ".student-work-"
_LEFT_AFTER_S = 24 * 3600.0  # without a word in its folder no training goes on
RESIZE_INTERVAL_S = 60.0  # between two looks whether the cluster has room for more workers
_POLL_S = 0.5
# That workers wait for one another, while the first one evaluates, say; torch's own half an hour
# would end a training whose evaluations take longer. That one has died is told at once by Ray.
_MEETING_S = 12 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A finished training."""

    path: Path  # the exported Hugging Face folder
    best: Evaluation  # the exported checkpoint's
    evaluations: tuple[Evaluation, ...]
    steps: int  # taken
    stopped_early: bool  # by training.patience
    n_rows: int  # train rows
    world_size: int
    seconds: float  # of training, over all starts; without Ray's start-up
    resumed_from_step: int  # 0 in a run that was never cut short


def train(
    recipe: Recipe,
    load: Load,
    model: Model,
    out_dir: Path,
    *,
    inputs: str,
    labels_digest: str,
    store: str | None = None,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train on the ``train`` rows, pick a checkpoint by the ``calibrate`` rows, export to out_dir.

    Ray is up. load is called in every worker, in another directory than the driver's: its paths
    must be absolute. model: where its weights come from. inputs: digest of all that decides the
    result; a run that was killed goes on at its last checkpoint when called with the same. store:
    as of ``step.train``.
    Raises DataError, ModelError or ClusterError.
    """
    out_dir = out_dir.absolute()
    work = work_folder(out_dir, inputs, store)
    checkpoints = Checkpoints.claim(work)
    before = checkpoints.latest()
    task = Task(training=recipe.training, checkpoints=checkpoints, load=load, name=recipe.name)
    if before and before.finished:
        state = before
    else:
        tell = _teller(checkpoints, on_progress)
        state = _followed(lambda: _fit(task, work.local), tell)
    result = _result(out_dir, state, recipe.training, before)
    origin = export.Provenance(
        recipe=recipe,
        parent=model,
        inputs=inputs,
        labels_digest=labels_digest,
        world_size=recipe.training.workers,
        hardware=hardware(),
    )
    checkpoints.fetch_curve()
    with _plain(checkpoints.model(result.best.step), load, work.local) as best_model:
        export.write(out_dir, best_model, checkpoints.curve, result.best, state, origin)
    Mirror(local=out_dir, url=store and f"{store}/{out_dir.name}").push()
    clear_work(out_dir, inputs, store)
    return result


def work_folder(out_dir: Path, inputs: str, store: str | None = None) -> Mirror:
    """Where a training keeps its state until it is done."""
    return Mirror(local=out_dir.absolute().parent, url=store).below(f"{_WORK}{inputs}")


def clear_work(out_dir: Path, inputs: str, store: str | None = None) -> None:
    """Remove the work of a student that is done, and what other settings began before it.

    Whoever calls has locked the run's folder, so that nobody else on this disk trains in it. In a
    store, where another machine may, what was written to within a day stays.
    """
    work_folder(out_dir, inputs, store).remove()
    for other in out_dir.absolute().parent.glob(f"{_WORK}*"):
        shutil.rmtree(other, ignore_errors=True)  # with a store, a copy
    if store is None:
        return
    limit = datetime.now(UTC) - timedelta(seconds=_LEFT_AFTER_S)
    for name in Folder(store).folders():
        if name.startswith(_WORK):
            folder = Folder(f"{store}/{name}")
            items = list(folder.walk(""))
            if all(item.modified < limit for item in items):
                for item in items:
                    folder.delete(item.name)


@contextlib.contextmanager
def _plain(model_dir: Path, load: Load, work: Path) -> Iterator[Path]:
    """A checkpoint's model as a Hugging Face folder; low-rank matrices are merged for it, in a
    folder below ``work``: one killed there leaves no file in a checkpoint, which would be damaged
    by it."""
    if not (model_dir / LORA).exists():
        yield model_dir
        return
    import torch

    with scratch_folder(work / "merged") as merged:
        load(model_dir, torch.device("cpu")).export(merged)
        yield merged


def _fit(task: Task, work: Path) -> State:
    """Run the workers to the end; what rank 0 returned, or its error raised."""
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    training = task.training
    resources = {"CPU": training.cpus_per_worker}
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker
    trainer = TorchTrainer(
        lambda: worker.run(task),
        torch_config=TorchConfig(timeout_s=_MEETING_S),
        scaling_config=ScalingConfig(
            num_workers=_n_workers(training),
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            resources_per_worker=resources,
            use_gpu=training.gpus_per_worker > 0,
            label_selector=training.node_labels or None,
        ),
        run_config=RunConfig(
            # A fresh name: Ray Train would restore what it finds under an old one.
            name=task.checkpoints.attempt,
            storage_path=str(work / "ray"),
            failure_config=FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={
                "env_vars": {} if training.gpus_per_worker else allocating.KEEP_IN_THREADS
            },
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        for failure in (
            *getattr(error, "worker_failures", {}).values(),
            getattr(error, "controller_failure", None),
        ):
            # A full disk, say; of other OSErrors the last line below tells.
            with contextlib.suppress(OSError), disk_errors(work):
                if isinstance(failure, JourneymanError | OSError):
                    raise failure from error
        raise ClusterError(
            f"{work}: training failed {training.max_failures + 1} times, the last time with "
            f"{str(error).strip().splitlines()[-1]}; mend that and start it again: it goes on from "
            "its last checkpoint."
        ) from error
    except RayActorError as error:  # of Ray Train's own controller: workers' are above
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"{work}: Ray lost the training ({first}), as it does where memory runs out or a node "
            "goes away; start it again: it goes on from its last checkpoint."
        ) from error
    if isinstance(outcome, JourneymanError):
        raise outcome
    return outcome


def _n_workers(training: Training) -> int | tuple[int, int]:
    """As Ray Train takes it: a range makes it resize the group, which restarts it."""
    fewest = training.min_workers or training.workers
    return training.workers if fewest == training.workers else (fewest, training.workers)


def _result(out_dir: Path, state: State, training: Training, before: State | None) -> TrainResult:
    assert state.best is not None  # a finished run has evaluated after its last step
    return TrainResult(
        path=out_dir,
        best=state.best,
        evaluations=state.evaluations,
        steps=state.step,
        stopped_early=state.stopped_early,
        n_rows=state.n_rows,
        world_size=training.workers,
        seconds=state.seconds,
        resumed_from_step=before.step if before else 0,
    )


def _followed(fit: Callable[[], State], tell: Callable[[], None], poll_s: float = _POLL_S) -> State:
    """Call ``tell`` while ``fit`` runs, and once at its end; what fit returned or raised.

    fit runs in a thread of its own: in the main thread Ray Train would take over Ctrl-C for
    good (2.60, ``_register_sigint_handler``). A daemon, so that Ctrl-C ends the process.
    """
    outcome: Future[State] = Future()

    def run() -> None:
        try:
            outcome.set_result(fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="training", daemon=True).start()
    while not wait([outcome], timeout=poll_s).done:
        tell()
    tell()
    return outcome.result()


def _teller(
    checkpoints: Checkpoints, on_progress: Callable[[TrainProgress], None] | None
) -> Callable[[], None]:
    """Hands on where the run stands, if it is another than the last time."""
    told: TrainProgress | None = None

    def tell() -> None:
        nonlocal told
        shown = checkpoints.shown() if on_progress else None
        if on_progress is None or shown is None:
            return
        progress = TrainProgress(**shown)
        if progress != told:
            on_progress(progress)
            told = progress

    return tell
